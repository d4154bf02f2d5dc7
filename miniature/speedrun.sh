#!/usr/bin/env bash
# From nothing to scored weights on two CPU cores, or on a GPU:
#
#     bash miniature/speedrun.sh [OUT]        OUT: a folder, runs/speedrun by default
#     LONG=1 bash miniature/speedrun.sh       two to three times the samples in stages 0 to 2: for a GPU
#     QUICK=1 bash miniature/speedrun.sh      see in minutes that all of it runs; its numbers mean nothing
#
# The same command resumes where it stopped; to redo a stage, delete its folder and those of all later ones.
# OUT/nano are the weights, with a log of each stage in OUT/nano/logs; OUT/table.md says what each stage took
# and what came out; OUT/STAGE and OUT/eval/NAME have states, curves, previews, results, and as output.txt
# what was printed. All paths are relative to the repository. PYTHON names another python.
set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "speedrun.sh: needs bash 4.4 or newer, this is $BASH_VERSION" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
quick=${QUICK:-} long=${LONG:-} python=${PYTHON:-python}
out=${1:-runs/speedrun${quick:+-quick}${long:+-long}}
nano=$out/nano
export OMP_NUM_THREADS=1                # a process for each core: tensors are small, threads would only wait

# Of a stage, whatever isn't in train.py's RECIPES. captions: what stage 0 begins with; a vision tower learns
# shapes many times sooner where an image shows one, and nothing but its description is asked for.
recipe() {
    local size=${quick:+ --steps 4 --batch 8} dit=dim=64,n_layers=1,n_heads=2,n_kv_heads=1,ffn_dim=176
    case ${size:-${long:+$1}} in
        0) size=' --steps 3500 --batch 96' ;;
        1) size=' --steps 3200 --batch 256' ;;
        2) size=' --steps 400 --batch 256' ;;
    esac
    case $1 in
        captions) echo "--fresh --world captions=1,objects=1${size:- --steps 1000}" ;;
        0 | 2) echo "$size" ;;
        1) echo "--fresh$size${quick:+ --dit $dit}" ;;
        *) echo "--fresh$size" ;;
    esac
}

everything() {
    # Side by side only what writes different files: clip and stage 0 both write config.json.
    train clip vae
    train captions
    train 0 decoder
    train 1
    train 2
    evaluate alignment alignment --images 1
    evaluate novel alignment --novel --images 1
    evaluate as-typed alignment --no-upsample --images 1
    evaluate free-prompts alignment --prompts assets/free_prompts.jsonl
    evaluate understanding understanding
    evaluate editing editing
    evaluate chat chat
    evaluate upsampling upsampling
    evaluate reconstruction reconstruction
    evaluate judge judge
    until_running 0
}

# ---- what runs: by its name, which is its folder in OUT --------------------------------------------------

declare -A pid=() cores=() began=() clock=() command=()    # with set -u, an array without a value is unbound

# start NAME CORES COMMAND...: in the background
start() {
    local name=$1 where
    cores[$name]=${gpu:-$2} began[$name]=$SECONDS clock[$name]=$out/$name/clock-$(date +%s)
    shift 2
    where=$([[ $gpu ]] && echo the GPU || echo "${cores[$name]} of 2 cores")
    mkdir -p "$out/$name"
    echo "$(date +%H:%M) $out/$name on $where, prints into its output.txt"
    echo "$(date) on $where: $*" >> "$out/$name/output.txt"
    "$@" >> "$out/$name/output.txt" 2>&1 &
    pid[$name]=$!
}

# A file for each start has its cores, or "gpu", and seconds: no crash loses more than a tick.
note_time() {
    echo "${cores[$1]} $((SECONDS - began[$1]))" > "${clock[$1]}"
}

# A second later: the time, and what has ended.
tick() {
    local name output
    sleep 1
    for name in "${!pid[@]}"; do
        output=$out/$name/output.txt
        note_time "$name"
        if kill -0 "${pid[$name]}" 2> /dev/null; then continue; fi
        wait "${pid[$name]}" || give_up 1 "$out/$name failed: see the end of $output"
        unset "pid[$name]"
        # A training that somebody else has stopped ends without an error, too.
        if [[ $(tail -n 1 "$output") == stopped* ]]; then give_up 1 "$out/$name was stopped"; fi
        finish "$name"
    done
}

until_running() {
    while ((${#pid[@]} > $1)); do tick; done
}

# Remember that NAME is done, by its command: with another one it isn't.
finish() {
    local file
    for file in log.jsonl curves.png; do
        if [[ -f $out/$1/$file ]]; then
            mkdir -p "$nano/logs"
            cp "$out/$1/$file" "$nano/logs/$1.${file##*.}"
        fi
    done
    echo "${command[$1]}" > "$out/$1/done"
}

# is_done NAME COMMAND
is_done() {
    command[$1]=$2
    [[ -f $out/$1/done && $(< "$out/$1/done") == "$2" ]]
}

# Stop what runs; trainings save their state. SIGTERM, as a shell has its background jobs ignore SIGINT.
halt() {
    local name
    if ((${#pid[@]})); then kill -TERM "${pid[@]}" 2> /dev/null || true; fi
    for name in "${!pid[@]}"; do
        wait "${pid[$name]}" || true
        note_time "$name"
        unset "pid[$name]"
    done
}

# give_up CODE SENTENCE
give_up() {
    trap - INT TERM HUP                 # a second Ctrl-C ends this at once
    halt
    echo "speedrun.sh: $2" >&2
    exit "$1"
}

# train STAGE...: side by side, a core each; where one ends, the other goes on with both, unless on a GPU, or
# clip, which contrasts the images of one process
train() {
    local stage left=() launch processes=1 workers='' extra
    for stage; do
        if ! is_done "$stage" "$(recipe "$stage")"; then left+=("$stage"); fi
    done
    if ((${#left[@]} == 0)); then return; fi
    launch=("$python")
    if [[ ! $gpu && ${left[*]} != clip ]] && ((${#left[@]} == 1)); then
        launch=("$python" -m torch.distributed.run --standalone --nproc_per_node=2) processes=2
    fi
    if [[ $gpu ]]; then workers="--workers $((readers / ${#left[@]}))"; fi
    for stage in "${left[@]}"; do
        read -ra extra <<< "${command[$stage]} $how $workers"
        if [[ " $stages_with_flag " == *" $stage "* ]]; then extra+=($compile); fi
        start "$stage" $processes "${launch[@]}" train.py --stage "${stage/captions/0}" \
            "${extra[@]}" --quiet --init "$nano" --save "$nano" --out "$out/$stage"
    done
    until_running $((${#gpu} ? 0 : ${#left[@]} - 1))
    halt
    train "$@"
}

# evaluate NAME COMMAND...: of eval.py, on one core, as soon as one is free
evaluate() {
    local name=eval/$1
    shift
    if is_done "$name" "$*${quick:+ (quick)}"; then return; fi
    if [[ $1 != judge ]]; then set -- "$@" --ckpt "$nano" --dtype fp32; fi
    if [[ $quick && $1 == alignment ]]; then
        set -- "$@" --n-prompts 6 --images 1
    elif [[ $quick ]]; then
        set -- "$@" --n 6
    fi
    until_running 1
    start "$name" 1 "$python" eval.py "$@" --out "$out/$name"
}

# ---- the run ---------------------------------------------------------------------------------------------

# bf16 and compile only on CPUs with products in bf16: a GPU spends its time on launching the kernels of so
# small tensors. The flag `compile` is for the stages `stages_with_flag`: on CPUs only the DiT gains by being
# compiled; on a GPU, where it is train.py's default for all stages but 0, the flag says no.
how='' compile='' stages_with_flag='1 2'
gpu=$("$python" -c 'import torch; print("gpu" if torch.cuda.is_available() else "")')
if [[ $gpu ]]; then                     # it reads faster than a core draws: all but one of up to 16 draw
    readers=$(getconf _NPROCESSORS_ONLN) readers=$((readers > 16 ? 15 : readers - 1))
    how=--no-bf16 compile=--no-compile stages_with_flag='clip vae decoder 1 2'
elif grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2> /dev/null; then
    how=--bf16
    if [[ ! $quick ]] && command -v "${CXX:-g++}" > /dev/null; then compile=--compile; fi
fi
mkdir -p "$nano"
trap 'give_up 130 "stopped; the same line goes on from here"' INT TERM HUP
"$python" -m miniature.speedrun "$out" --here
everything
"$python" -m miniature.speedrun "$out"
