"""What both Snakefiles need first: the checkout with library, scripts, default config and shipped model; and containers."""

import contextlib
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
        checkout = Path(folder.get_path_or_uri(secret_free=True)).parent
        if not (checkout / "src/auto_quantize_model").is_dir():
            sys.exit(
                f"{checkout} has no src/auto_quantize_model. Without shared files, Snakemake sends a job what git tracks in"
                " the working directory; start Snakemake in a git clone"
            )
        return checkout
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


def in_containers(workflow):
    """Whether jobs run in containers: --sdm apptainer."""
    return "APPTAINER" in {method.name for method in workflow.deployment_settings.deployment_method}


def image_of(workflow, image):
    """The image for containers: the one that the config names, or the name that `make image` gives, which is local.

    A run that asks for a container and names no image ends here, because no registry has the local image.
    """
    if not image and in_containers(workflow):
        sys.exit(
            "--sdm apptainer needs an image, and machine.image names none; make one (make image), and name it:"
            " --config machine='{image: docker://REGISTRY/auto-quantize-model:TAG}', or the path of a .sif file"
        )
    return image or "docker://auto-quantize-model"


def show_to_containers(checkout, config):
    """Let containers see what a run uses outside of its working directory, through a variable that apptainer reads.

    Without it a container has the working directory as its home folder, and no other folder of the user. So the hub's
    cache gets its name from the home folder out here. Folders that jobs write into must exist before they are shown.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.path.expanduser(os.environ.get("HF_HOME") or f"{cache}/huggingface")
    os.environ.update(HF_HOME=home)
    written = [home, config["machine"]["score_store"]]
    if config["model"]["source"] == "hub":
        written.append(os.path.dirname(config["model"]["path"]))  # get_model makes a link there
    for folder in filter(None, written):
        with contextlib.suppress(OSError):  # a job that needs the folder says what is wrong with it
            os.makedirs(folder, exist_ok=True)
    read = [os.environ.get("HF_HUB_CACHE"), config["model"]["path"], config["calibration"]["path"]]
    read += [scheme.get("checkpoint") for scheme in config["sensitivity"]["schemes"] if isinstance(scheme, dict)]
    variable = "APPTAINER_BIND" if shutil.which("apptainer") else "SINGULARITY_BIND"
    shown = {}
    for name in filter(None, [str(checkout), *written, *read]):
        for folder in folders_behind(Path(name)):
            if folder.exists() and folder != folder.parent and not folder.is_relative_to(Path.cwd()):
                shown[str(folder)] = None
    if wrong := [folder for folder in shown if {",", ":"} & set(folder)]:
        sys.exit(f"{wrong[0]}: apptainer cannot show a folder whose name has a comma or a colon; rename it")
    already = os.environ.get(variable, "")  # of the user, or of another model of this run
    new = [folder for folder in shown if folder not in already.split(",")]
    os.environ[variable] = ",".join(filter(None, [already, *new]))


def folders_behind(path):
    """The folder of a path, where the path leads if it is a link, and where the links in its folder lead.

    A snapshot in a cache of the hub is a folder of such links.
    """
    for place in (Path(os.path.abspath(path)), path.resolve()):
        yield place if place.is_dir() and not place.is_symlink() else place.parent
    if path.is_dir():
        yield from {entry.resolve().parent for entry in path.iterdir() if entry.is_symlink()}
