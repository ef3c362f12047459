#!/usr/bin/env bash
# Run .ci/run as continuous integration does: in a clone of HEAD, without a terminal. Then note which commit passed.
set -euo pipefail
# A hook of git's runs with variables that point every git command at its repository, and CDPATH leads `cd` elsewhere.
# What else could choose tests, or find other modules, is nothing that continuous integration has.
unset CDPATH VIRTUAL_ENV MAKEFLAGS MAKELEVEL $(git rev-parse --local-env-vars)
unset $(compgen -e | grep -E '^(PYTHON.+|PYTEST.*|CLOISTER.*)$' || true)
cd "$(dirname "$0")/.."

commit=$(git rev-parse HEAD)
passed=$(realpath "$(git rev-parse --git-path checked)")
[ -z "$(git status --porcelain)" ] || echo "note: what is not committed is not part of this"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone --quiet --no-hardlinks . "$folder/clone"
git -C "$folder/clone" checkout --quiet --detach "$commit"
[ ! -d ../shared ] || ln -s "$(realpath ../shared)" "$folder/shared"

CI=true bash "$folder/clone/.ci/run" < /dev/null 2>&1 | cat
echo "$commit" > "$passed"
echo "checked: $commit"
