"""The HTTP server: parses, checks, tokenizes, chooses a DP rank, sends one message per sequence, streams what comes
back.

Knows the messages of `moesaic.launch.engine.messages` and nothing else of the engine: no batches, no pages, no model.
The way of a request through the files: app (routes) -> body (JSON) -> generate | chat | completions | responses (one
API each) -> sampling, prompt (checks) -> run (a group of sequences) -> client (ranks) -> run -> detokenizer -> the
answer.
"""
