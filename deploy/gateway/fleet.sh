#!/usr/bin/env bash
# N quires and the Shepherd model gateway in front of them, on this machine's loopback, until Ctrl-C.
#
#   pip install smg==1.13.0
#   deploy/gateway/fleet.sh [WORKERS] [flags of `quire serve`]
#
#   deploy/gateway/fleet.sh 2
#   deploy/gateway/fleet.sh 4 --model ./Qwen3-0.6B --quantize q8_0 --threads 2
#
# QUIRE and SMG name the programs; the gateway listens on PORT, worker n (from 0) on HTTP_BASE + n and GRPC_BASE + n.
set -euo pipefail
# Each program is a process group of its own: Ctrl-C is for this script, which ends them in their order. It would be the workers' first signal, and ours their
# second, which cuts off what they have accepted.
set -m

workers=2
if [[ ${1-} =~ ^[0-9]+$ ]]; then
  workers=$1
  shift
fi
quire=${QUIRE:-quire} smg=${SMG:-smg} port=${PORT:-30000} http_base=${HTTP_BASE:-8000} grpc_base=${GRPC_BASE:-50051}

pids=()
# The gateway ends first, so that nothing new comes; then the workers finish what they have.
stop() {
  trap - EXIT
  # Who asks again does not want to wait: a worker that is told twice exits at once.
  trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM HUP
  for ((at = ${#pids[@]} - 1; at >= 0; at--)); do
    kill -TERM "${pids[at]}" 2>/dev/null || true
    if ((at == workers)); then wait "${pids[at]}" 2>/dev/null || true; fi
  done
  until wait; do :; done
}
trap stop INT TERM HUP EXIT

urls=()
for ((n = 0; n < workers; n++)); do
  "$quire" serve --http "127.0.0.1:$((http_base + n))" --grpc "127.0.0.1:$((grpc_base + n))" "$@" &
  pids+=($!)
  urls+=("grpc://127.0.0.1:$((grpc_base + n))")
done

# cache_aware follows each worker's KV events; nothing has to be switched on for them. A worker that does not answer two checks in a row
# gets no requests until it answers again.
"$smg" launch --host 127.0.0.1 --port "$port" --prometheus-host 127.0.0.1 \
  --worker-urls "${urls[@]}" --policy cache_aware \
  --health-check-interval-secs 2 --health-failure-threshold 2 --health-success-threshold 1 \
  --shutdown-grace-period-secs 30 &
pids+=($!)

# Whoever ends first ends the fleet.
wait -n "${pids[@]}"
