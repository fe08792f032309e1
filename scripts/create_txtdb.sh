#!/usr/bin/env bash
# Create the paper's text databases from Karpathy's annotations:
#
#     bash scripts/create_txtdb.sh ANN_DIR TXT_DB [OPTION of create_txtdb.py...]
#
# ANN_DIR contains dataset_flickr30k.json, dataset_coco.json or both. Writes TXT_DB/itm_flickr30k_{train,val,test}.db and
# TXT_DB/itm_coco_{train,restval,val,test}.db; databases that exist are left as they are.

set -euo pipefail
{ : 3>&1; } 2>/dev/null || exec >/dev/null # a closed standard output is no error
scripts=$(dirname "${BASH_SOURCE[0]}")

fail() {
    echo "create_txtdb: $*" >&2 || :
    exit 2
}

create() { # create the databases of dataset $1 for splits $2...
    local name=$1 split output
    [[ -e $ann_dir/dataset_$name.json ]] || return 0
    for split in "${@:2}"; do
        output=$txt_db/itm_${name}_$split.db
        if [[ -e $output ]]; then
            echo "$output: exists already" || exit 2
        else
            bash "$scripts/python.sh" "$scripts/create_txtdb.py" --annotations "$ann_dir/dataset_$name.json" --split "$split" \
                --output "$output" ${options[@]+"${options[@]}"}
        fi
    done
}

(($# >= 2)) || fail "usage: create_txtdb.sh ANN_DIR TXT_DB [OPTION of create_txtdb.py...]"
readonly scripts ann_dir=$1 txt_db=$2
readonly options=("${@:3}")
[[ -e $ann_dir/dataset_flickr30k.json || -e $ann_dir/dataset_coco.json ]] ||
    fail "ANN_DIR: neither dataset_flickr30k.json nor dataset_coco.json in '$ann_dir'"
create flickr30k train val test
create coco train restval val test
