"""Prefill and decode on instances of their own: roles, the protocol between them, and the transport of KV pages.

Decode *fetches*: a prefill rank announces the pages of a room that are complete, and the decode rank that owns the target pages
reads them into its own memory. So nobody but a page's owner ever writes to it, and the owner always knows whether a write may
still be in flight. Terms: a *room* is one request's way from prefill to decode; an *instance* is one server; a *source* is a
prefill rank that a decode rank fetches from; pages have an *index* in their sequence and a number in a rank's pool.
"""
