"""Who may do what: Cedar policies behind one call, `Policy.decide`.

Guarantees: deny by default; an evaluation error denies (a Cedar `forbid` that errors would otherwise be skipped);
policies that do not validate against the schema are never loaded; a decision names the rule that made it; what a site
adds cannot lift a shipped `forbid`.
Not guaranteed: that the attributes in the request are true. The caller reads them from its own records.
"""

from cloister.policy.decide import ROLES, WORKLOAD_ROLES, Decision, Policy, Request

__all__ = ["ROLES", "WORKLOAD_ROLES", "Decision", "Policy", "Request"]
