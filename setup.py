"""The packages of the wheel: those of the checkout, and `configs/` as `tessera_recipes`."""

from setuptools import find_packages, setup

PACKAGES = find_packages(include=["tessera*", "pretrain*", "data_pipes*", "launchers*"])
setup(packages=[*PACKAGES, "tessera_recipes"], package_dir={"tessera_recipes": "configs"})
