#!/usr/bin/env bash
# Hosts as network namespaces on this machine, Ray on each, the application of a Serve config file across them; all of it
# is gone after Ctrl-C. Arguments are those of `vlcache-dist localcluster` (vlcache_dist/localcluster), e.g. `--hosts 4 --demo`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=$root/.venv/bin/vlcache-dist
[[ -x $bin ]] || bin=vlcache-dist
exec "$bin" localcluster --config "$root/deploy/serve/cpu-1e-2p-1d.yaml" "$@"
