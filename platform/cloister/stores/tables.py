"""The tables of the authority's state.

Wrapped data keys live beside the ledger, so that clearing one clears the other. No table holds a key in clear, a row of
data or a token. The log's own tables hold no personal name: they name people by pseudonyms, of which `pseudonyms` is
the only mapping. A change here needs a migration: `cloister.stores.migrations`.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

# Every constraint has a name, since a migration can only change what it can name.
metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

identities = Table(
    "identities",
    metadata,
    Column("name", String, primary_key=True),
    Column("kind", String, nullable=False),  # person, service, node, run, endpoint
    Column("roles", JSON, nullable=False),
    Column("public_key", Text, unique=True),  # of whom logs in through an issuer: none until they register one
    # The subject at an outside OpenID Connect issuer, where the identity has one.
    Column("issuer", String),
    Column("subject", String),
    Column("attributes", JSON, nullable=False),  # of a node: region, assurance
    Column("epoch", Integer, nullable=False),  # tokens of an earlier epoch are dead
    Column("disabled", Boolean, nullable=False),
    Column("registered_by", String, nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("issuer", "subject"),
)

used_assertions = Table(
    "used_assertions",
    metadata,
    Column("jti", String, primary_key=True),
    Column("expires", Float, nullable=False, index=True),
)

# RFC 6749 section 6, rotating: each is used once, and a second use ends its whole family.
refresh_tokens = Table(
    "refresh_tokens",
    metadata,
    Column("digest", String, primary_key=True),
    Column("family", String, nullable=False, index=True),
    Column("name", String, nullable=False, index=True),
    Column("used", Boolean, nullable=False),
    Column("expires", Float, nullable=False),
)

# What replicas ask for: every change that kills tokens, in order. Rows go when all tokens they speak of are dead.
revocations = Table(
    "revocations",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("name", String, nullable=False),
    Column("epoch", Integer, nullable=False),  # tokens of `name` below this epoch are dead
    Column("token_id", String, index=True),  # or only this one
    Column("created", Float, nullable=False),
)

# Roles for a while (just-in-time access). Given by an approval, gone by themselves.
elevations = Table(
    "elevations",
    metadata,
    Column("approval", String, primary_key=True),
    Column("name", String, nullable=False, index=True),
    Column("role", String, nullable=False),
    Column("starts", Float, nullable=False),
    Column("expires", Float, nullable=False),
)

# The public halves of the keys that sign access tokens; the newest signs.
token_keys = Table(
    "token_keys",
    metadata,
    Column("key_id", String, primary_key=True),
    Column("public_key", Text, nullable=False),
    Column("secret", String, nullable=False, unique=True),  # the name of the private half in the key service
    Column("created", Float, nullable=False),
    Column("retired", Float),
)

# Who a pseudonym of the log stands for. Deleting a person's rows makes the log anonymous about them, for good.
pseudonyms = Table(
    "pseudonyms",
    metadata,
    Column("pseudonym", String, primary_key=True),
    Column("person", String, nullable=False, index=True),
    Column("value", String, nullable=False),  # the name itself, or an address that they called from
    UniqueConstraint("person", "value"),
)

policy_versions = Table(
    "policy_versions",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("text", Text, nullable=False),  # the site's own policies, beside the shipped ones
    Column("digest", String, nullable=False),
    Column("author", String, nullable=False),
    Column("created", Float, nullable=False),
)

datasets = Table(
    "datasets",
    metadata,
    Column("name", String, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("owner", String, nullable=False),
    Column("owner_key", Text, nullable=False),  # that signed the manifest; the owner may have another by now
    # Its public facts, beside the manifest that holds them too: that one may list 50,000 files.
    Column("schema", JSON, nullable=False),
    Column("kind", String, nullable=False),  # seal, append, erase, rectify
    Column("parents", JSON, nullable=False),
    Column("rows", BigInteger, nullable=False),  # as published; exact in versions of before there was such a number
    Column("files", Integer, nullable=False),
    Column("manifest", JSON, nullable=False),
    Column("manifest_digest", String, nullable=False),
    Column("envelope", JSON, nullable=False),
    Column("created", Float, nullable=False),
    # When the files that were sealed in this version are to be gone, and when the first of those that it lists is.
    Column("files_due", Float, nullable=False),
    Column("due", Float, nullable=False),
    Column("ended", Float),  # since when nobody may open it; the erasure that ended it
    Column("erasure", String),
)

data_keys = Table(
    "data_keys",
    metadata,
    Column("name", String, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("file", String, primary_key=True),
    Column("wrapped", LargeBinary, nullable=False),
    ForeignKeyConstraint(["name", "version"], ["datasets.name", "datasets.version"]),
)

# Versions of a wrapping key that are to be destroyed in the key service, and when that was done.
key_destructions = Table(
    "key_destructions",
    metadata,
    Column("name", String, primary_key=True),
    Column("below", Integer, primary_key=True, autoincrement=False),
    Column("created", Float, nullable=False),
    Column("destroyed", Float),
)

# What was destroyed on purpose, and the certificate about it: signed once the keys are gone for good.
erasures = Table(
    "erasures",
    metadata,
    Column("id", String, primary_key=True),
    Column("dataset", String, nullable=False, index=True),
    Column("facts", JSON, nullable=False),
    Column("certificate", JSON),
    Column("created", Float, nullable=False),
)

# Blobs that are to be deleted, until they are.
deletions = Table(
    "deletions",
    metadata,
    Column("region", String, primary_key=True),
    Column("path", String, primary_key=True),
    Column("erasure", String, nullable=False, index=True),
)

# One for each owner, population and unit. A dataset of before there were populations has a ledger of its own, by its
# own name, and that has no population. Others have a random name: the log has it, and the log names nobody.
ledgers = Table(
    "ledgers",
    metadata,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False, index=True),
    Column("population", String),
    Column("unit", String, nullable=False),  # its column; empty where it is a row
    UniqueConstraint("owner", "population", "unit"),
)

# Which versions spend from which ledger, and the approval that it took where their owner has others.
ledger_members = Table(
    "ledger_members",
    metadata,
    Column("dataset", String, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("ledger", String, nullable=False, index=True),
    Column("approval", String),
)

budgets = Table(
    "budgets",
    metadata,
    Column("ledger", String, primary_key=True),
    Column("epsilon", Float, nullable=False),
    Column("delta", Float, nullable=False),
    # The order that weighs the most in the filter over its runs: not changed any more once there is a run.
    Column("order", Integer),
)

# Who changed a ledger's budget, from what to what, with which approval.
budget_changes = Table(
    "budget_changes",
    metadata,
    Column("ledger", String, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("person", String, nullable=False),
    Column("epsilon_before", Float, nullable=False),
    Column("epsilon", Float, nullable=False),
    Column("delta_before", Float, nullable=False),
    Column("delta", Float, nullable=False),
    Column("approval", String),
    Column("created", Float, nullable=False),
)

# The digest of a ledger (its datasets, its budget, and the ledger's columns of its runs), sealed by the key service
# with each change. `counter` is how many there were; 0, with an empty seal, in a state of before there were seals.
ledger_seals = Table(
    "ledger_seals",
    metadata,
    Column("ledger", String, primary_key=True),
    Column("counter", Integer, nullable=False),
    Column("seal", LargeBinary, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String, primary_key=True),
    Column("author", String, nullable=False),
    Column("dataset", String, nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("plan", JSON, nullable=False),
    Column("code_digest", String, nullable=False),
    Column("attributes", JSON, nullable=False),  # of the dataset, as policy sees them: owner, region, purpose, class
    Column("approval", String),
    Column("state", String, nullable=False),
    Column("steps_committed", Integer, nullable=False),
    Column("steps_done", Integer, nullable=False),
    Column("rows_per_s", Float),
    # The attempt that is under way, or was the last: 0 before the first. `position` is how far in the plan it has
    # committed; `steps_committed` counts over all attempts, steps that were run again too.
    Column("attempt", Integer, nullable=False),
    Column("world_size", Integer, nullable=False),  # of the attempt that is open; 0 when none is
    Column("resume_from", Integer, nullable=False),
    Column("position", Integer, nullable=False),
    Column("checkpoint", JSON),  # the newest: step, blob, sha256
    # The ledger's columns: what this run holds of which budget, now and for good; and its Rényi divergences at
    # `privacy.renyi.ORDERS`, which runs of before there was a filter have not.
    Column("ledger", String, nullable=False, index=True),
    Column("epsilon_charged", Float, nullable=False),
    Column("delta_charged", Float, nullable=False),
    Column("renyi_charged", JSON),
    # Whether what was not used is given back: by a signed end, which is kept; or because no attempt was ever opened.
    Column("settled", Boolean, nullable=False),
    Column("run_end", JSON),
    Column("model_key", LargeBinary, nullable=False),
    Column("error", JSON),
    Column("flags", JSON, nullable=False),  # erasures of data that it learned from, by their ids
    Column("created", Float, nullable=False),
    Column("ended", Float),
)

# One lease a rank and attempt, so that neither a replayed request nor a left-over worker gets keys again.
leases = Table(
    "leases",
    metadata,
    Column("run", String, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("rank", Integer, primary_key=True),
    Column("created", Float, nullable=False),
)

models = Table(
    "models",
    metadata,
    Column("name", String, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("run", String, nullable=False, unique=True),
    Column("author", String, nullable=False),
    Column("stage", String, nullable=False),
    Column("root_digest", String, nullable=False),
    Column("manifest", LargeBinary, nullable=False),
    Column("bundle", LargeBinary, nullable=False),
    Column("provenance", JSON, nullable=False),
    Column("blob", String, nullable=False),
    Column("blob_sha256", String, nullable=False),
    Column("model_key", LargeBinary, nullable=False),
    Column("seal_context", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("flags", JSON, nullable=False),  # as its run's
    # From promotion on: who approved it, with their statements, as every replica verifies them.
    Column("release", JSON),
    Column("created", Float, nullable=False),
)

# One request for n-of-m approval. `digest` is that of exactly what is approved; `subject` names it for people.
approvals = Table(
    "approvals",
    metadata,
    Column("id", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("digest", String, nullable=False, index=True),
    Column("details", JSON, nullable=False),  # what the approvers are shown and sign, whose digest it is
    Column("author", String, nullable=False),
    Column("required", Integer, nullable=False),
    Column("state", String, nullable=False),  # open, used, refused, void
    Column("expires", Float, nullable=False),
    Column("created", Float, nullable=False),
)

votes = Table(
    "votes",
    metadata,
    Column("approval", String, primary_key=True),
    Column("person", String, primary_key=True),
    Column("key_id", String, nullable=False),
    Column("decision", String, nullable=False),
    Column("envelope", JSON, nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("approval", "key_id"),
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("deployed_by", String, nullable=False),
    Column("quota_requests", Integer, nullable=False),
    Column("quota_window_s", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("created", Float, nullable=False),
)

quota_windows = Table(
    "quota_windows",
    metadata,
    Column("model", String, primary_key=True),
    Column("subject", String, primary_key=True),
    Column("window_start", Integer, primary_key=True),
    Column("granted", Integer, nullable=False),
)

log_entries = Table(
    "log_entries",
    metadata,
    Column("index", BigInteger, primary_key=True, autoincrement=False),
    Column("entry", LargeBinary, nullable=False),
)

# Complete subtrees of 256, 65,536 … leaves (level 1, 2 …), so that a proof reads a few hundred hashes and no more.
log_nodes = Table(
    "log_nodes",
    metadata,
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("index", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary, nullable=False),
)

# One row: the tree as it is now, and the signed checkpoint over it. Replaced with each transaction.
log_head = Table(
    "log_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("size", BigInteger, nullable=False),
    Column("tree", JSON, nullable=False),
    Column("note", Text, nullable=False),
)

# Checkpoints that a witness has co-signed: notes that carry the witness's line too.
log_checkpoints = Table(
    "log_checkpoints",
    metadata,
    Column("size", BigInteger, primary_key=True, autoincrement=False),
    Column("note", Text, nullable=False),
)
