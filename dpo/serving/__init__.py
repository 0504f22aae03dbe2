"""A web page and an OpenAI-compatible API in which a trained policy and its reference answer side by side.

A request passes through `security` (authentication, limits, timeouts), `app` (routes), `schema` (validation),
`tokenization` (text to tokens and back), `service` (both models, scoring), `engine` (batched generation) and `reply`
(responses in OpenAI's format). `server` loads the models and runs the process. Training imports none of this.
"""
