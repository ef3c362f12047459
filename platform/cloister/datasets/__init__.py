"""Datasets: what is publicly known about a table, and how its rows become sealed parts and model inputs.

schema      columns, their types, public bounds or values, and sensitivity classes
ingest      CSV or Parquet to the compact table that is sealed
partition   rows to shards, columns to class files
encoding    columns to model inputs, the same in training and serving
manifest    what the authority records about a sealed version
"""
