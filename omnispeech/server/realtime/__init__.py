"""GET /v1/realtime: live conversations, as OpenAI's Realtime protocol has them."""
