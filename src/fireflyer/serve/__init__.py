"""The OpenAI API over the engine: HTTP requests in, answers out, whole or as server-sent events.

Reading order: settings, protocol, errors, admission, readiness, metrics, generation, streaming, completions,
chat_completions, app, server.
"""
