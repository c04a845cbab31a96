"""Loss functions: pure functions of projections, with one value per row.

* `contrast`: contrastive losses: `cosines`, `info_nce`, `nt_xent`.
* `divergence`: one distribution over the candidates supervises another: `ddm`,
  `teacher_entropy`.
* `prediction`: regression of a target projection without negatives:
  `regression`.
* `cacr`: hard negatives repel more, hard positives attract more:
  `cacr_attraction`, `cacr_repulsion`, `cacr_rbf`, `cacr_euclidean`.

Shapes use `N` rows per replica, `G` rows of the global batch and `C` candidates
(keys of the batch and of the queue). Inputs are unit rows (projections) or
their similarities, cosines in [-1, 1]. Every function divides by its own
temperature. No function averages over rows, divides by the number of replicas
or holds state: `Method.train_step` does. All computation is in at least
float32. (float16 would underflow: a typical probability over 65,536 keys is
1e-5 to 1e-9.)
"""

from clsa_tf.losses.cacr import (
    cacr_attraction,
    cacr_euclidean,
    cacr_rbf,
    cacr_repulsion,
)
from clsa_tf.losses.contrast import cosines, info_nce, nt_xent
from clsa_tf.losses.divergence import ddm, teacher_entropy
from clsa_tf.losses.prediction import regression

__all__ = [
    "cacr_attraction",
    "cacr_euclidean",
    "cacr_rbf",
    "cacr_repulsion",
    "cosines",
    "ddm",
    "info_nce",
    "nt_xent",
    "regression",
    "teacher_entropy",
]
