#!/usr/bin/env bash
# tox 4.67.15: a reference to another section that an environment inherits through `base =` is not replaced. It stays
# as it is written, and since `pass_env` takes any pattern, nothing is refused and nothing is said: the variables that
# the line names are not passed, and a job runs without its token, its cache or its proxy.
#
# The same line in the environment itself is replaced. A list that several environments inherit has to stand, spelt
# out, in the section that they name as their base.
#
# Seen (2026-12-01, Python 3.11):
#   inherited:      {[testenv:a]pass_env} stands in the list, MY_TOKEN does not; the command sees MY_TOKEN empty
#   not inherited:  MY_TOKEN stands in the list; the command sees it
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tox==4.67.15
cat > "$folder/tox.ini" <<'INI'
[shared]
skip_install = true
pass_env = {[testenv:a]pass_env}

[testenv:a]
skip_install = true
pass_env = MY_TOKEN

[testenv:inherited]
base = shared
commands = python -c "import os; print('token:', os.environ.get('MY_TOKEN'))"

[testenv:direct]
skip_install = true
pass_env = {[testenv:a]pass_env}
commands = python -c "import os; print('token:', os.environ.get('MY_TOKEN'))"
INI
cd "$folder"
export MY_TOKEN=some-words
for env in inherited direct; do
  echo "== $env"
  listed=$(venv/bin/tox config -e "$env" -k pass_env)
  ran=$(venv/bin/tox run -q -e "$env" 2>&1)
  grep -E "testenv|MY_TOKEN" <<< "$listed" || true
  grep "token:" <<< "$ran"
  case $env in
    inherited) grep -qF '{[testenv:a]pass_env}' <<< "$listed" && grep -q "token: None" <<< "$ran" ;;
    direct) ! grep -qF '{[testenv:a]pass_env}' <<< "$listed" && grep -q "token: some-words" <<< "$ran" ;;
  esac
done
echo "as described"
