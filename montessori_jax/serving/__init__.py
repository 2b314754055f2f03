"""Text from servers: a vLLM sidecar of our own, a running one, any OpenAI-compatible address."""
