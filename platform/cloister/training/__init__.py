"""Training: one run from spec to exported model.

architectures   the models that a spec can name
loop            DP-SGD on one rank, in plain torch
export          ONNX
evaluation      how the model does on rows that were held out
worker          the loop inside a Ray Train worker: lease, open, train, seal
driver          the Ray job that starts the workers
"""
