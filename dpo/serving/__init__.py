"""A trained run -> a page and an API where the policy and its reference answer and are compared.

`models` finds and reads the two models, `sampling` draws tokens, `engine` answers many requests at a time, `scorer` scores with
the project's own scorer, `text` turns messages into tokens and back, `schema` says what a request may hold, `answers` and `app`
speak HTTP, `guard` is what stands in front, `server` starts and stops it all. Nothing here is imported by training.
"""
