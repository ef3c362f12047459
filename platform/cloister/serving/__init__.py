"""Answering questions to a released model over HTTPS.

tables.py      the Open Inference Protocol's JSON: strict reading, writing
quota.py       row budgets, spent from blocks that the authority has already debited
scorer.py      the ONNX session
release.py     what a replica verifies itself before it serves
pipeline.py    one request from token to answer; plain Python, no Ray, no server
app.py         HTTP around the pipeline (ASGI)
listener.py    the replica's own TLS 1.3 port
endpoint.py    the endpoint directory: configuration, trust, keys
replica.py     all of it as one object that Ray Serve can supervise
deployment.py  the Serve application
"""
