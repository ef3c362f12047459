"""From Cedar text to policies by name, in Cedar's JSON form: limited in size and depth, parsed, fit for the schema.

The limits come first because Cedar's parser recurses: 800 nested brackets, or 12,800 links in one chain, end the whole
process by a stack overflow, and a path of 2,000 names takes seconds. A site's text comes from outside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import cedarpy

from cloister.errors import InputError

MAX_POLICY_CHARACTERS = 4096
MAX_DEPTH = 32
MAX_PATH = 8

# As Cedar's own lexer: comments end with the line, strings know escapes. An open string goes to the end of the text,
# since trying each of many open quotes would take quadratic time.
_PIECE = re.compile(r'//[^\n\r]*|"(?:\\.|[^"\\])*(?P<closed>"?)|.', re.DOTALL)
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def parse_rules(text: str, schema: cedarpy.Schema) -> dict[str, Any]:
    """The policies of a text, by `@id`.

    Raises:
        InputError: the text does not parse or does not fit the schema; a policy is too large or too deep, has a slot,
            or no `@id` of its own. The message names the policy and the problem.
    """
    _require_modest(text)
    try:
        parsed = json.loads(cedarpy.policies_to_json_str(text))
    except (ValueError, RecursionError) as error:
        raise InputError(f"the policies do not parse: {_line(error)}", "compare them with the shipped ones") from None
    if parsed["templates"]:
        raise InputError("a policy has a slot (?principal or ?resource)", "name the role or the type itself")
    rules: dict[str, Any] = {}
    # Cedar numbers them in the order of the text, `policy0`, `policy1`…
    for number, policy in sorted(
        parsed["staticPolicies"].items(), key=lambda item: int(item[0].removeprefix("policy"))
    ):
        name = policy.get("annotations", {}).get("id") or ""
        if not _ID.fullmatch(name):
            place = int(number.removeprefix("policy")) + 1
            raise InputError(f"policy number {place} has no good @id", '@id("letters-digits-and-hyphens") above it')
        if name in rules:
            raise InputError(f"two policies have the id {name}", "give each policy an @id of its own")
        rules[name] = policy
        prepare({name: policy})
    found = cedarpy.validate_policies(text, schema)
    if not found.validation_passed:
        first = found.errors[0]
        name = found.id_annotations_by_policy_id.get(first.policy_id, first.policy_id)
        problem = _line(first.error).removeprefix(f"for policy `{first.policy_id}`").lstrip(" ,:")
        line = text.count("\n", 0, max(0, text.find(f'"{name}"'))) + 1
        raise InputError(
            f"policy {name} (line {line}) does not fit the schema: {problem}", "compare it with a shipped policy"
        )
    return rules


def prepare(rules: Mapping[str, Any]) -> cedarpy.PolicySet:
    """A handle that Cedar evaluates, whose policies bear the names that `rules` gives them.

    Raises:
        InputError: a condition is too deep for Cedar's JSON form, which ends at about fifty links of one `&&` or `||`.
    """
    try:
        whole = json.dumps({"staticPolicies": dict(rules), "templates": {}, "templateLinks": []})
        return cedarpy.PolicySet.from_json_str(whole)
    except (ValueError, RecursionError):
        names = ", ".join(rules)
        raise InputError(f"a condition of policy {names} is too long", "write it as several policies") from None


def _require_modest(text: str) -> None:
    for number, content in enumerate(text.split("\n"), 1):  # what does not show would hide a rule from who approves it
        if not content.replace("\t", " ").isprintable() or "\ufffd" in content:
            raise InputError(f"line {number}: a character that does not show", "write plain text")
    depth = length = path = 0
    for match in _PIECE.finditer(text):
        piece = match.group()
        if piece.startswith("//"):
            continue
        length = 0 if piece == ";" else length + len(piece)
        depth = max(0, depth + (piece in "([{") - (piece in ")]}"))
        path = path + (piece == ".") if piece.isalnum() or piece.isspace() or piece in "._" else 0
        if match["closed"] == "":
            problem = "a string has no end"
        elif length > MAX_POLICY_CHARACTERS:
            problem = f"a policy has more than {MAX_POLICY_CHARACTERS} characters"
        elif depth > MAX_DEPTH:
            problem = f"brackets are more than {MAX_DEPTH} deep"
        elif path > MAX_PATH:
            problem = f"a path has more than {MAX_PATH} names"
        else:
            continue
        line = text.count("\n", 0, match.start()) + 1
        raise InputError(f"line {line}: {problem}", "mend it, or write several policies")


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
