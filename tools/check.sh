#!/usr/bin/env bash
# Run .ci/run as continuous integration does: in a clone of HEAD, without a terminal. Then note which commit passed.
set -euo pipefail
cd "$(dirname "$0")/.."

commit=$(git rev-parse HEAD)
passed=$(realpath "$(git rev-parse --git-path checked)")
[ -z "$(git status --porcelain)" ] || echo "note: what is not committed is not part of this"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone --quiet --no-hardlinks . "$folder/clone"
git -C "$folder/clone" checkout --quiet --detach "$commit"
[ ! -d ../shared ] || ln -s "$(realpath ../shared)" "$folder/shared"

env -u VIRTUAL_ENV -u PYTHONPATH -u MAKEFLAGS -u MAKELEVEL CI=true bash "$folder/clone/.ci/run" < /dev/null
echo "$commit" > "$passed"
echo "checked: $commit"
