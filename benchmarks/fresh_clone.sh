#!/usr/bin/env bash
# The main figure: `make run` on a fresh clone, installation and training included, then again with nothing to do.
#   benchmarks/fresh_clone.sh [FOLDER]     clones this checkout's HEAD into FOLDER (default: a temporary one)
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
clone=${1:-$(mktemp -d)}/moepress
git clone --quiet "$source" "$clone"
cd "$clone"
time_of() { SECONDS=0; "$@" >>"$clone.log" 2>&1; echo "$SECONDS s: $*"; }
time_of make install
time_of make run
time_of make run
.venv/bin/python benchmarks/study_figures.py results
echo "clone: $clone, log: $clone.log"
