#!/usr/bin/env bash
# Makes the paper's text databases from Karpathy's annotations:
#
#     bash scripts/create_txtdb.sh ANN_DIR TXT_DB [OPTION of create_txtdb.py...]
#
# ANN_DIR has dataset_flickr30k.json, dataset_coco.json or both; TXT_DB gets itm_flickr30k_{train,val,test}.db and
# itm_coco_{train,restval,val,test}.db. A database that is there already is left as it is.

set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")
readonly scripts

fail() {
    echo "create_txtdb: $*" >&2
    exit 2
}

make() { # of the annotations of $1 the databases of splits $2...
    local name=$1 split output
    shift
    for split in "$@"; do
        output=$txt_db/itm_${name}_$split.db
        if [[ -e $output ]]; then
            echo "$output: is there already"
        else
            bash "$scripts/python.sh" "$scripts/create_txtdb.py" --annotations "$ann_dir/dataset_$name.json" --split "$split" \
                --output "$output" ${options[@]+"${options[@]}"}
        fi
    done
}

(($# >= 2)) || fail "usage: create_txtdb.sh ANN_DIR TXT_DB [OPTION of create_txtdb.py...]"
readonly ann_dir=$1 txt_db=$2
readonly options=("${@:3}")
[[ -e $ann_dir/dataset_flickr30k.json || -e $ann_dir/dataset_coco.json ]] ||
    fail "ANN_DIR: neither dataset_flickr30k.json nor dataset_coco.json in '$ann_dir'"
if [[ -e $ann_dir/dataset_flickr30k.json ]]; then
    make flickr30k train val test
fi
if [[ -e $ann_dir/dataset_coco.json ]]; then
    make coco train restval val test
fi
