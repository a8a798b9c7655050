#!/usr/bin/env bash
# Runs an evaluation as a Slurm job array, one part per task, and merges the parts when all are done:
#
#   scripts/slurm_eval.sh PARTS FOLDER COMMAND...
#   SLURM_OPTIONS="--gpus=1 --time=4:00:00" scripts/slurm_eval.sh 8 /shared/report \
#       respodiff eval fairness --concepts woman.safetensors,man.safetensors --model ./sd15
#
# FOLDER is on a file system that all nodes see. It gets part-0, part-1, ..., and `whole` with the report of all; logs
# are beside them. SLURM_OPTIONS goes to the tasks of the array. A part that was killed or preempted is continued, not
# begun again, by the same call or by Slurm's requeueing. Prints the numbers of both jobs.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ $1 =~ ^[1-9][0-9]*$ ]] || { echo "$1 is not a number of parts; give 1 or more" >&2; exit 2; }
parts=$1 folder=$(realpath -m "$2")
shift 2
mkdir -p "$folder"
[ ! -e "$folder/whole" ] || { echo "$folder/whole is there already; delete it, or give another folder" >&2; exit 1; }

command=$(printf '%q ' "$@")
quoted=$(printf '%q' "$folder")
# shellcheck disable=SC2086
array=$(sbatch --parsable --requeue --array=0-$((parts - 1)) --job-name=respodiff --output="$folder/part-%a.log" \
    ${SLURM_OPTIONS:-} --wrap="$command --shard \$SLURM_ARRAY_TASK_ID/$parts --out $quoted/part-\$SLURM_ARRAY_TASK_ID")
folders=$(for ((i = 0; i < parts; i++)); do printf '%q ' "$folder/part-$i"; done)
merge=$(sbatch --parsable --dependency="afterok:$array" --kill-on-invalid-dep=yes --job-name=respodiff-merge \
    --output="$folder/merge.log" --wrap="$(printf '%q' "$1") eval merge $folders --out $quoted/whole")
echo "$array $merge"
