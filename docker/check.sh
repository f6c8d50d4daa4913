#!/usr/bin/env bash
# Checks the deployment as far as a machine without a container engine can: Debian's buildah, debootstrap, docker-compose,
# prometheus and nginx-light have to be there, and root. Takes minutes. With --no-image, all but the image.
#
# PIP_ARGS: for the image's pip. MIRROR: of Debian, for the base image. OVERLAY: a folder that is laid over it, with
# certificates or settings of pip that a proxy needs.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=.venv/bin/python
WORK=$(mktemp -d)
PIDS=()
trap 'kill "${PIDS[@]}" 2>/dev/null || true; rm -rf "$WORK"' EXIT

say() { printf '== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

wait_for() { # url, seconds
    for _ in $(seq "$2"); do
        curl -sf "$1" >/dev/null && return
        sleep 1
    done
    fail "$1 does not answer"
}

serve() { # port, flags: a server from the checkout
    local port=$1
    shift
    .venv/bin/magicdec serve --port "$port" --threads 1 "$@" >"$WORK/serve-$port.out" 2>"$WORK/serve-$port.log" &
    PIDS+=($!)
}

ask() { # base url, tokens: the text of a completion
    curl -sfN "$1/v1/completions" -H 'Content-Type: application/json' \
        -d "{\"prompt\": \"Once upon a time\", \"max_tokens\": $2, \"temperature\": 0, \"stream\": true}"
}

say 'compose files'
for files in compose.yaml 'compose.yaml -f docker/compose.observability.yaml' compose.gpu.yaml compose.replicas.yaml; do
    # shellcheck disable=SC2086
    docker-compose -f docker/$files config -q
done

say 'rules and configuration of Prometheus'
promtool check config docker/prometheus/prometheus.yml >/dev/null
(cd docker/prometheus && promtool test rules rules_test.yml >/dev/null)

say 'two servers, behind nginx'
serve 8101
wait_for http://127.0.0.1:8101/ready 300
serve 8102
wait_for http://127.0.0.1:8102/ready 300
printf 'server 127.0.0.1:8101 max_fails=1 fail_timeout=10s;\nserver 127.0.0.1:8102 max_fails=1 fail_timeout=10s;\n' \
    >"$WORK/replicas.conf"
sed "s/listen 8080/listen 127.0.0.1:8100/" docker/nginx/nginx.conf >"$WORK/nginx.conf"
nginx -e stderr -p "$WORK" -c "$WORK/nginx.conf" -t -q
nginx -e stderr -p "$WORK" -c "$WORK/nginx.conf" -g 'daemon off;' &
PIDS+=($!)
wait_for http://127.0.0.1:8100/ready 10
for _ in 1 2 3 4; do
    [ "$(ask http://127.0.0.1:8100 8 | grep -c '"text"')" -ge 2 ] || fail 'no stream through nginx'
done
for port in 8101 8102; do
    curl -sf "http://127.0.0.1:$port/metrics" | grep -q '^magicdec_generated_tokens_total{[^}]*} [1-9]' ||
        fail "the server on $port got no request"
done

say 'Prometheus scrapes, and every query of rules and dashboard has data'
sed -e "s/magicdec:8000/127.0.0.1:8101/" -e "s/: 5s/: 1s/" docker/prometheus/prometheus.yml >"$WORK/prometheus.yml"
cp docker/prometheus/rules.yml "$WORK/"
prometheus --config.file="$WORK/prometheus.yml" --storage.tsdb.path="$WORK/tsdb" --web.listen-address=127.0.0.1:8190 \
    >"$WORK/prometheus.log" 2>&1 &
PIDS+=($!)
wait_for http://127.0.0.1:8190/-/ready 30
for _ in $(seq 12); do
    ask http://127.0.0.1:8101 60 >/dev/null
    sleep 1
done
$PYTHON docker/check_queries.py http://127.0.0.1:8190

say 'a replica goes, requests go on'
kill "${PIDS[1]}"
for _ in 1 2 3 4; do
    ask http://127.0.0.1:8100 8 | grep -q DONE || fail 'a request failed after a replica had gone'
done

[ "${1:-}" = --no-image ] && { say 'all but the image is checked'; exit; }

say 'the base image'
if ! buildah images -q magicdec-base >/dev/null 2>&1; then
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$WORK/root" \
        ${MIRROR:+"$MIRROR"} >"$WORK/debootstrap.log"
    [ -z "${OVERLAY:-}" ] || cp -a "$OVERLAY/." "$WORK/root/"
    container=$(buildah from scratch)
    buildah add -q "$container" "$WORK/root" / >/dev/null
    buildah commit -q "$container" magicdec-base >/dev/null
    buildah rm "$container" >/dev/null
    rm -rf "$WORK/root"
fi

say 'the CPU image'
buildah build -q --isolation chroot --network=host -f docker/Dockerfile --target cpu -t magicdec:cpu \
    --build-arg PYTHON_IMAGE=localhost/magicdec-base --build-arg PIP_ARGS="${PIP_ARGS:-}" . >"$WORK/build.log" 2>&1 ||
    { tail -20 "$WORK/build.log"; fail 'the image cannot be built'; }

say 'its server'
container=$(buildah from magicdec:cpu)
buildah run --isolation chroot "$container" -- sh -c 'command -v g++ && exit 1; id -u' | grep -qx 10001 ||
    fail 'a compiler is in the image, or it runs as another user'
buildah run --isolation chroot --network=host "$container" -- /usr/local/bin/entrypoint --config /configs/cpu.yaml --port 8103 \
    >"$WORK/image.out" 2>"$WORK/image.log" &
PIDS+=($!)
wait_for http://127.0.0.1:8103/ready 600
grep -q 'kernels \(amx\|avx\|neon\|portable\)' "$WORK/image.log" || fail 'the image has no compiled kernels for this processor'
ask http://127.0.0.1:8103 8 | grep -q DONE || fail 'no answer from the image'
buildah rm "$container" >/dev/null || true

say 'all is checked'
