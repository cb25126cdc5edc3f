"""The OpenAI surface: what a body may say, and what the answers look like.

Imports no web framework; knows no engine.
"""
