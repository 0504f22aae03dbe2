"""A trained run -> a page and an API where the policy and its reference answer and are compared.

In the order of a request: `server` starts and stops it all, `guard` stands in front, `app` has the routes, `schema`
says what a request may hold, `text` turns messages into tokens and back, `service` counts and scores, `engine` runs
many requests at a time through one model, `reply` says their tokens in OpenAI's form. Training imports none of it.
"""
