#!/usr/bin/env bash
# CLSA on a Cloud TPU VM with eight cores (v2-8 or v3-8), started from your
# own machine:
#
#   bash configs/cluster/tpu_vm.sh NAME ZONE --flagfile=configs/clsa.flags \
#       --dataset='tfrecord:gs://bucket/train-*' --num_examples=1281167
#
# Not tested, for lack of a TPU. The script creates the machine, installs the
# project and trains. All arguments after the zone are passed to the training.
# The run is on the machine's disk, in clsa_tf/runs. Copy it before you delete
# the machine with
#
#   gcloud compute tpus tpu-vm delete NAME --zone=ZONE
set -euo pipefail
name=$1 zone=$2
shift 2

gcloud compute tpus tpu-vm create "$name" --zone="$zone" \
    --accelerator-type=v3-8 --version=tpu-vm-tf-2.15.0-pjrt

# The machine's TensorFlow is built for its TPU. Do not use constraints.txt,
# which would replace it.
gcloud compute tpus tpu-vm scp --recurse --zone="$zone" . "$name:clsa_tf"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" \
    --command='cd clsa_tf && pip install -e .'

# The TPU does the augmentation, because its host would be the bottleneck.
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --command="
    cd clsa_tf && python -m clsa_tf.train $(printf '%q ' "$@") \
        --workdir=runs/clsa --tpu=local --precision=mixed_bfloat16 \
        --augment_on=device"
