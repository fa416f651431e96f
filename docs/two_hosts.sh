#!/bin/bash
# Two "hosts" on one machine: network namespaces with an address each, joined by a cable of 1 Gbit/s. Needs root.
# Usage: docs/two_hosts.sh torchrun | tcp | restart | lost
set -euo pipefail

what=${1:?torchrun, tcp, restart or lost}
folder=$(mktemp -d)
train="--data synthetic --model mlp --tau 4 --steps 400 --log-every 100 --evaluate-every 200 --folder $folder/run"
export OMP_NUM_THREADS=1

cleanup() {
    jobs -p | xargs -r kill 2>/dev/null || true
    wait || true
    for host in 1 2; do ip netns delete "distoptim$host" 2>/dev/null || true; done
    rm -rf "$folder"
}
trap cleanup EXIT

for host in 1 2; do ip netns add "distoptim$host"; done
ip link add cable1 netns distoptim1 type veth peer name cable2 netns distoptim2
for host in 1 2; do
    ip -n "distoptim$host" address add "10.99.0.$host/24" dev "cable$host"
    ip -n "distoptim$host" link set lo up
    ip -n "distoptim$host" link set "cable$host" up
    tc -n "distoptim$host" qdisc add dev "cable$host" root tbf rate 1gbit burst 256kb latency 50ms
done

# on HOST COMMAND: gloo must be told the interface, since the host's name leads elsewhere.
on() {
    local host=$1
    shift
    ip netns exec "distoptim$host" env "GLOO_SOCKET_IFNAME=cable$host" "$@"
}

# agent HOST: torchrun as it would be started on each host. That host 1 has the store is said, since both have one name.
agent() {
    on "$1" env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=2 --nproc-per-node=1 --max-restarts=2 \
        --rdzv-backend=c10d --rdzv-endpoint=10.99.0.1:29500 --rdzv-id=two-hosts \
        --rdzv-conf="is_host=$((2 - $1))" --local-addr="10.99.0.$1" \
        -m distoptim train $train --checkpoint-every 20 --auto-resume "${@:2}"
}

checkpoint() {
    until [ -e "$folder/run/checkpoints/latest" ]; do sleep 0.1; done
    cat "$folder/run/checkpoints/latest"
}

case $what in
torchrun) agent 2 & agent 1 ;;
tcp)
    on 2 distoptim train --init tcp://10.99.0.1:29500 --world-size 2 --rank 1 $train &
    on 1 distoptim train --init tcp://10.99.0.1:29500 --world-size 2 --rank 0 $train
    ;;
restart)
    agent 2 --latency-ms 20 & agent 1 --latency-ms 20 &
    checkpoint >/dev/null
    # The worker on host 2 is the process there that has a rank.
    victim=$(for pid in $(ip netns pids distoptim2); do
        if grep -qz '^RANK=' "/proc/$pid/environ"; then echo "$pid"; fi
    done | head -1)
    echo "after $(cat "$folder/run/checkpoints/latest"): kill -9 of the worker on host 2"
    kill -9 "$victim"
    ;;
lost)
    # The cable is cut before the processes die, so that nobody says goodbye: host 1 must notice by itself.
    agent 2 --latency-ms 20 &
    lost=$!
    agent 1 --latency-ms 20 --timeout-s 20 &
    checkpoint >/dev/null
    ip -n distoptim2 link set cable2 down
    echo "$(date +%T) after $(checkpoint): host 2 is lost, kill -9 of its agent and worker"
    ip netns pids distoptim2 | xargs kill -9
    wait "$lost" || true
    sleep 45
    echo "$(date +%T) a new agent on host 2; on host 1 $(ip netns pids distoptim1 | wc -l) process is left, $(checkpoint)"
    ip -n distoptim2 link set cable2 up
    agent 2 --latency-ms 20 &
    ;;
*) echo "$what: allowed is torchrun, tcp, restart or lost" >&2; exit 2 ;;
esac
for job in $(jobs -p); do wait "$job"; done
echo "bytes over the cable, host 1: $(ip netns exec distoptim1 cat /sys/class/net/cable1/statistics/tx_bytes)"
echo "kinds of lines in the record:"
grep -o '"kind": *"[a-z]*"' "$folder/run/record.jsonl" | sort | uniq -c
