"""What a model is (`manifest`) and what must hold before it is served (`release`)."""
