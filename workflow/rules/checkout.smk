"""What both Snakefiles need first: the checkout with library, scripts, default config and shipped model; and the image."""

import os
import shutil
import sys
import tempfile
from pathlib import Path


def checkout_of(folder):
    """The checkout that holds a folder of this workflow, as Snakemake names the folder.

    A module may name a repository of a host instead, as snakedeploy writes it. Snakemake reads single files from a bare
    clone then, and the library is more than one file. So the commit is unpacked once, in the working directory, where
    jobs on other machines find it too.
    """
    if folder.is_local:
        return Path(folder.get_path_or_uri(secret_free=True)).parent
    repository = folder.hosted_repo.repo
    commit = repository.commit(folder.ref).hexsha
    unpacked = Path(".snakemake/auto-quantize", commit).absolute()
    if not unpacked.exists():
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=unpacked.parent) as made:
            repository.git.archive(commit, output=f"{made}/files.zip")
            shutil.unpack_archive(f"{made}/files.zip", f"{made}/files")
            try:
                os.rename(f"{made}/files", unpacked)  # whole, or not at all
            except OSError:
                if not unpacked.exists():  # no other process was faster
                    raise
    return unpacked


def image_of(workflow, config):
    """The image that the config names for containers; without one, the name that `make image` gives, which is local.

    A run that asks for a container and names no image ends here, because no registry has the local image.
    """
    image = (config.get("machine") or {}).get("image")
    if not image and "APPTAINER" in {method.name for method in workflow.deployment_settings.deployment_method}:
        sys.exit(
            "--sdm apptainer needs an image, and machine.image names none; make one (make image), and name it:"
            " --config machine='{image: docker://REGISTRY/auto-quantize-model:TAG}', or the path of a .sif file"
        )
    return image or "docker://auto-quantize-model"
