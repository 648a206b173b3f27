"""Data sets: from a RunConfig to batches of normalised images on the training device."""

import torch

from pgt_diag.config import DatasetName, Decode, RunConfig
from pgt_diag.data.base import BadImage, ImageData
from pgt_diag.data.folder import FolderData
from pgt_diag.data.memory import InMemoryData
from pgt_diag.data.sources import read_images
from pgt_diag.distributed import ALL, Shard
from pgt_diag.errors import ConfigurationError
from pgt_diag.preflight import check_download

__all__ = ["BadImage", "ImageData", "fetch_data", "load_data"]


def load_data(
    config: RunConfig,
    *,
    device: torch.device | str = "cpu",
    shard: Shard = ALL,
) -> ImageData:
    """Open the data set that a configuration names.

    Small data sets are read whole and kept on `device` as uint8; `imagefolder` only lists its
    files, so a damaged image is found when its batch is read. `shard` is this process's share
    where several train together.

    Raises DataError when the data is missing, incomplete or damaged, and ConfigurationError when
    the configuration does not fit it (a batch larger than the training set, a folder given to a
    data set that has none).
    """
    device = torch.device(device)
    if config.dataset is not DatasetName.IMAGEFOLDER:
        return InMemoryData(config, device, read_images(config), shard)
    if config.decode is Decode.GPU and device.type != "cuda":
        raise ConfigurationError(
            f"decode is gpu, and training is on {device}: it needs a CUDA GPU; use cpu"
        )
    return FolderData(config, device, shard)


def fetch_data(config: RunConfig) -> None:
    """Fetch the data set that a configuration names to this machine, if it is not there yet.

    Fashion-MNIST and the CIFARs are fetched; what is embedded or made up is always there.

    Raises DataError when that fails, and ConfigurationError for a folder, which nobody offers.
    """
    check_download(config)
    read_images(config, download=True)
