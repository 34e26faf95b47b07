"""One OpenAI-compatible API, mounted by the server and by the edge."""
