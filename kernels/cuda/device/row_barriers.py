"""Where the threads and blocks that share a row wait for each other."""

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.shared_numbers import cluster_arrive, cluster_wait
from gpusoftmax.kernels.cuda.device.split import is_columns, split_cluster


@device
def announce(split):
    """The first half of `meet`: a block tells the others of its cluster that it has started."""
    if split_cluster(split) > 1:
        cluster_arrive()


@device
def meet(split):
    """All blocks of the cluster have started: their shared memory may be written to."""
    if split_cluster(split) > 1:
        cluster_wait()


@device
def exchange_states(split):
    """The states of all chunks of the row are in the shared memory of each block before any warp reads them."""
    if split_cluster(split) > 1:
        cluster_arrive()
        cluster_wait()
    elif is_columns(split):
        cuda.syncwarp()  # the chunks of a row are one warp's
    else:
        cuda.syncthreads()
