"""The gateway: OpenAI's HTTP in front, token ids behind. Importing it costs nothing."""
