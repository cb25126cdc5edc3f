"""Generated from protos/quire/v1 by `make protos`; a test checks that it is fresh."""
