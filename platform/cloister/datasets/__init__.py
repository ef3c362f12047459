"""Datasets: what is publicly known about a table, and how its rows become sealed parts and model inputs.

schema      columns, their types, public bounds or values, and sensitivity classes
ingest      a file's rows, block by block, to the compact tables that are sealed
inspect     a file's first rows to a proposed schema
recognise   what personal data looks like
subjects    people's identifiers to pseudonyms, and tags by which their rows are found
ordinals    which rows of a unit come first, for runs that use few of each
partition   rows to shards, columns to class files
manifest    what the authority records about a sealed version
lineage     how a version may follow from those before it
erasure     what a certificate says is gone, and how far what remains is bounded
encoding    columns to model inputs, the same in training and serving
"""
