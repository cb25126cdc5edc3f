"""Models: config.json -> DecoderConfig, and the one configurable decoder. See README.md."""
