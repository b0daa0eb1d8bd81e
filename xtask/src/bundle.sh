#!/usr/bin/env bash
# Runs what this folder holds on this host's GPU: the tests, once for each PTX, or the benches.
# Logs go to logs/ beside this file, or to the folder that $GAMMA_LOGS names.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
logs=${GAMMA_LOGS:-$here/logs}
mkdir -p "$logs" || exit 1
export GAMMA_TEST_DEVICE=cuda GAMMA_MODELS=$here/models

# Packed, since a folder like this may have to be small to be sent.
for packed in "$here"/tests/*.gz; do
    [ ! -f "$packed" ] || gzip -df "$packed" || exit 1
done

failures=0
table=$(printf '%-8s %-24s %7s %7s %8s  %s' ptx executable passed failed seconds result)

# run PTX NAME COMMAND...
run() {
    local ptx=$1 name=$2 log=$logs/$1-$2.log start=$SECONDS result=ok
    shift 2
    echo "== $name with $ptx"
    GAMMA_PTX=$ptx "$@" >"$log" 2>&1 || result="FAILED (exit $?)"
    tail -n 40 "$log"
    local passed failed
    passed=$(sed -n 's/^test result: .* \([0-9]*\) passed.*/\1/p' "$log" | tail -n 1)
    failed=$(sed -n 's/^test result: .* \([0-9]*\) failed.*/\1/p' "$log" | tail -n 1)
    # A test executable always ends with such a line; one without ran no tests, whatever its exit code says.
    [[ $name == bench-* || -n $passed ]] || result="FAILED (no result)"
    [ "$result" = ok ] || failures=$((failures + 1))
    table+=$'\n'$(printf '%-8s %-24s %7s %7s %8s  %s' \
        "$ptx" "$name" "${passed:-0}" "${failed:-0}" "$((SECONDS - start))" "$result")
}

for ptx in sm_80 sm_90a; do
    for test in "$here"/tests/*; do
        [ -f "$test" ] && run "$ptx" "$(basename "$test")" "$test" --show-output
    done
done
for bench in "$here"/benches/*; do
    [ -f "$bench" ] && run sm_90a "bench-$(basename "$bench")" "$bench" --bench
done

echo
echo "$table"
echo "$failures failed"
[ "$failures" -eq 0 ]
