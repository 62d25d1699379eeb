#!/usr/bin/env bash
# What a lease of a GPU should run, in this order, each section one command of at most ten minutes:
#
#   bash tests/gpu/lease.sh tests              # tests/gpu, 2-3 minutes
#   bash tests/gpu/lease.sh bench              # the benches on CUDA, 4-6 minutes
#   bash tests/gpu/lease.sh train10            # CIFAR-10 pictures, ResNet-18, 200 epochs, plain SimCLR
#   bash tests/gpu/lease.sh train100 none      # CIFAR-100, ResNet-18, 200 epochs: the baseline ...
#   bash tests/gpu/lease.sh train100 4         # ... Deep Augmentation at layer 4 ...
#   bash tests/gpu/lease.sh train100 6         # ... and at layer 6; several layers may stand in one command
#   bash tests/gpu/lease.sh compare            # table and figure of the CIFAR-100 runs
#   bash tests/gpu/lease.sh text none 8 10w    # simcse_deepaug.py: its benches, then a 12-layer BERT of width 256 from
#                                              # scratch with MLM; 8: with stop-gradient, 10w: without
#   bash tests/gpu/lease.sh probe vicreg       # vicreg_probe.py: its bench, then RES-5-250 on CIFAR-100, 200 epochs, probes
#   bash tests/gpu/lease.sh probe simclr       # the same with SimCLR's loss; both go on where a call's limit stopped them
#   bash tests/gpu/lease.sh rescue simclr      # topk_rescue.py: its bench, then ResNet-18 on CIFAR-100, 200 epochs, without
#                                              # and with rescue; also mocov3 and dinov2 (ViT-S/4); go on as above
#
# Sections may be joined: `lease.sh parts tests bench`. A section runs under `timeout`: a training run that meets its
# limit saves, and the same command goes on where it stopped. What to keep is put into $OUT (default runs/lease): a log
# for each command, and NAME.tgz with a run's report, metrics, settings and figures. Settings by environment:
#   EPOCHS=200  LIMIT=520 (seconds of one training run)  SEED=0  EXTRA="--compile"  PYTHON=python3
#   QUICK=1     a rehearsal on the CPU: benches in their quick form, one epoch of the small network
#
# How the data travel to a machine that sees nothing but this checkout (at most 64 MiB of it a call, and 30 minutes in
# all; the machine is given back after 30 idle seconds, so have the next call ready). Once, here, in the root:
#   mkdir -p .git/info lease-data && echo /lease-data/ >> .git/info/exclude
# Then, before the call named, fill lease-data (and name it in `carry`); what came stays in /tmp/lease-parts there:
#   call 1: lease.sh tests bench train10       58 MB
#       rm -rf lease-data/*; mkdir -p lease-data/cifar-10; cp ../shared/data/unpack.py lease-data/
#       cp ../shared/data/cifar-10/* lease-data/cifar-10/
#   call 2: lease.sh parts                     59 MB
#       rm -rf lease-data/*; mkdir -p lease-data/cifar-100; cp ../shared/data/unpack.py lease-data/
#       cp ../shared/data/cifar-100/{meta,test.zip,train-0.zip} lease-data/cifar-100/
#   call 3: lease.sh train100 none             42 MB
#       rm -rf lease-data/*; mkdir -p lease-data/cifar-100
#       cp ../shared/data/cifar-100/train-1.zip lease-data/cifar-100/
#   call 4, 5: lease.sh train100 4, then 6     nothing to carry
#   text:      lease.sh text none 8 10w        18 MB
#       rm -rf lease-data/*; cp -r ../shared/data/{unpack.py,sts,text} lease-data/
#   probe:     as calls 2 and 3 for CIFAR-100, then lease.sh probe vicreg, probe simclr
#   rescue:    likewise, then lease.sh rescue simclr, rescue mocov3, rescue dinov2
# Where ../shared/data is (as here), the parts are read from there.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
OUT=${OUT:-runs/lease}
PYTHON=${PYTHON:-python3}
PARTS=${PARTS:-/tmp/lease-parts}
QUICK=${QUICK:-}
EXTRA=${EXTRA:-}
DEVICE=${QUICK:+cpu}
DEVICE=${DEVICE:-cuda}
RUN=runs/lease${QUICK:+-quick}
export PYTHONUNBUFFERED=1 TQDM_MININTERVAL=20
mkdir -p "$OUT" runs
failed=0

run() {  # run SECONDS NAME COMMAND...: shown, limited, logged
    local limit=$1 name=$2; shift 2
    echo "\$ $*"
    timeout --kill-after=30 "$limit" "$@" 2>&1 | tr '\r' '\n' | tee "$OUT/$name.log"
    local code=$?
    [ $code = 0 ] || { echo "lease.sh: $name ended with code $code, limit $limit s (124: that was reached)"; failed=1; }
    return $code
}

take_parts() {  # what this call carried, beside what earlier calls did
    [ ! -d lease-data ] || { mkdir -p "$PARTS" && cp -rf lease-data/. "$PARTS/"; }
}

unpack() {  # unpack cifar-10 | cifar-100, into data/
    local from=$PARTS
    [ ! -f ../shared/data/unpack.py ] || from=../shared/data
    "$PYTHON" "$from/unpack.py" "$1" --parts "$from" --to data || { failed=1; return 1; }
}

train() {  # train NAME FLAGS...: go on if it was begun; then pack what is worth keeping
    local name=$1; shift
    local small=${QUICK:+--arch small --epochs 1 --warmup-epochs 0 --lr 0.5 --batch-size 512 --workers 2}
    # shellcheck disable=SC2086
    run "${LIMIT:-520}" "$name" "$PYTHON" simclr_deepaug.py --preset paper --epochs "${EPOCHS:-200}" \
        --seed "${SEED:-0}" --device "$DEVICE" --log-every 50 "$@" --out "$RUN-$name" --resume $small $EXTRA
    [ -d "$RUN-$name" ] || return
    (cd "$RUN-$name" && find . -maxdepth 1 \( -name '*.json' -o -name '*.csv' -o -name '*.png' \) -print0 |
        tar czf - --null -T -) > "$OUT/$name.tgz"
}

section_tests() {
    run 300 tests "$PYTHON" -m pytest tests/gpu -q -rs -p no:cacheprovider --durations=10
}

section_bench() {
    run 90 nt_xent "$PYTHON" tests/bench/bench_nt_xent.py --device "$DEVICE" --pictures 512 2048 8192 ${QUICK:+--quick}
    run 120 views "$PYTHON" tests/bench/bench_views.py --device "$DEVICE" ${QUICK:+--quick}
    run 300 step "$PYTHON" tests/bench/bench_step.py --device "$DEVICE" --arch resnet18 --batch-size 1024 --steps 20 \
        --repeats 2 --compile --profile --sweep ${QUICK:+--quick}
    run 60 cka "$PYTHON" tests/bench/bench_cka.py --device "$DEVICE" ${QUICK:+--images 32 --batch-size 16}
}

section_train10() {  # the packed set has 25,000 of the 50,000 training pictures, as PNG folders
    if [ -d data/cifar-10-batches-py ]; then
        train cifar10 --dataset cifar10 --data-dir data --layer none
    else
        [ -d data/cifar-10-png/train ] || unpack cifar-10 || return
        train cifar10 --dataset folder --data-dir data/cifar-10-png --image-size 32 --layer none
    fi
}

section_train100() {  # section_train100 LAYER...
    [ -f data/cifar-100-python/train ] || unpack cifar-100 || return
    for layer in "$@"; do
        train "cifar100-$layer" --dataset cifar100 --data-dir data --layer "$layer"
    done
}

section_text() {  # section_text LAYER...; a "w" behind it: without stop-gradient
    [ -d data/text ] || { unpack sts && unpack text; } || return
    run 120 simcse_step "$PYTHON" tests/bench/bench_simcse_step.py --device "$DEVICE" ${QUICK:+--quick}
    run 120 sts "$PYTHON" tests/bench/bench_sts.py --device "$DEVICE" ${QUICK:+--quick}
    local small=${QUICK:+--width 32 --train-file data/text/wiki1m_first11914.txt}
    for layer in "$@"; do
        local stop=--stop-grad
        [ "$layer" = "${layer%w}" ] || stop=--no-stop-grad
        # shellcheck disable=SC2086
        run "${LIMIT:-520}" "text-$layer" "$PYTHON" simcse_deepaug.py --train-file data/text/books_500k.txt \
            --sts-dir data/SentEval/data/downstream --width 256 --batch-size 256 --epochs 1 --lr 1e-3 \
            --seed "${SEED:-0}" --device "$DEVICE" --layer "${layer%w}" $stop --out "$RUN-text-$layer" --resume \
            $small $EXTRA
        (cd "$RUN-text-$layer" && find . -maxdepth 1 \( -name '*.json' -o -name '*.csv' -o -name '*.png' \) -print0 |
            tar czf - --null -T -) > "$OUT/text-$layer.tgz"
    done
}

section_probe() {  # section_probe OBJECTIVE...
    [ -f data/cifar-100-python/train ] || unpack cifar-100 || return
    run 120 probes "$PYTHON" tests/bench/bench_probes.py --device "$DEVICE" --part table ${QUICK:+--quick}
    local small=${QUICK:+--arch RES-1-16 --projector 32 32 --epochs 1 --sample-level 20 10 5 --target-net none}
    for objective in "$@"; do
        local lr=0.1
        [ "$objective" = vicreg ] || lr=0.5
        # shellcheck disable=SC2086
        run "${LIMIT:-520}" "probe-$objective" "$PYTHON" vicreg_probe.py --preset paper --epochs "${EPOCHS:-200}" \
            --lr $lr --weight-decay 1e-4 --warmup-epochs 10 --probe-epochs 0 1 5 20 40 100 --data-dir data \
            --objective "$objective" --seed "${SEED:-0}" --device "$DEVICE" --log-every 50 --mine-steps 1000 \
            --out "$RUN-probe-$objective" --resume $small $EXTRA
        (cd "$RUN-probe-$objective" && find . -maxdepth 1 \( -name '*.json' -o -name '*.csv' -o -name '*.png' \) \
            -print0 | tar czf - --null -T -) > "$OUT/probe-$objective.tgz"
    done
}

section_rescue() {  # section_rescue METHOD...
    [ -f data/cifar-100-python/train ] || unpack cifar-100 || return
    local tiny=${QUICK:+--arch vit-tiny --patch 8 --prototypes 64 --projector 32 16}
    local small=${QUICK:+$tiny --dataset shapes --epochs 1 --batch-size 512}
    for method in "$@"; do
        # shellcheck disable=SC2086
        run 120 "rescue-bench-$method" "$PYTHON" tests/bench/bench_rescue.py --device "$DEVICE" --methods "$method" \
            ${QUICK:+--quick} --flags --preset cifar $tiny
        for rescue in none topk; do
            # shellcheck disable=SC2086
            run "${LIMIT:-520}" "rescue-$method-$rescue" "$PYTHON" topk_rescue.py --preset cifar --method "$method" \
                --rescue "$rescue" --no-baseline --epochs "${EPOCHS:-200}" --data-dir data --seed "${SEED:-0}" \
                --device "$DEVICE" --log-every 50 --out "$RUN-rescue-$method-$rescue" --resume $small $EXTRA
            (cd "$RUN-rescue-$method-$rescue" && find . -maxdepth 1 \( -name '*.json' -o -name '*.csv' -o \
                -name '*.png' -o -name similarity.npz \) -print0 | tar czf - --null -T -) \
                > "$OUT/rescue-$method-$rescue.tgz"
        done
    done
}

section_compare() {
    run 60 compare "$PYTHON" simclr_deepaug.py --compare "$RUN"-cifar100-*
    cp runs/compare.png "$OUT/"
}

usage="usage: lease.sh {parts|tests|bench|train10|train100 [LAYER...]|text [LAYER...]|probe [LOSS...]|rescue [METHOD...]|compare}..."
[ $# -gt 0 ] || { echo "$usage"; exit 2; }
take_parts
while [ $# -gt 0 ]; do
    section=$1; shift
    case $section in
        parts) ls -R "$PARTS" ;;
        tests|bench|train10|compare) section_"$section" ;;
        train100)
            layers=()
            while [ $# -gt 0 ] && [[ $1 =~ ^(none|all|-?[0-9])$ ]]; do layers+=("$1"); shift; done
            [ ${#layers[@]} -gt 0 ] || layers=(none 4 6)
            section_train100 "${layers[@]}" ;;
        text)
            layers=()
            while [ $# -gt 0 ] && [[ $1 =~ ^(none|all|[0-9]+w?)$ ]]; do layers+=("$1"); shift; done
            [ ${#layers[@]} -gt 0 ] || layers=(none 8 10w)
            section_text "${layers[@]}" ;;
        probe)
            losses=()
            while [ $# -gt 0 ] && [[ $1 =~ ^(vicreg|simclr)$ ]]; do losses+=("$1"); shift; done
            [ ${#losses[@]} -gt 0 ] || losses=(vicreg simclr)
            section_probe "${losses[@]}" ;;
        rescue)
            methods=()
            while [ $# -gt 0 ] && [[ $1 =~ ^(simclr|mocov3|dinov2)$ ]]; do methods+=("$1"); shift; done
            [ ${#methods[@]} -gt 0 ] || methods=(simclr mocov3 dinov2)
            section_rescue "${methods[@]}" ;;
        *) echo "$usage"; exit 2 ;;
    esac
done
exit $failed
