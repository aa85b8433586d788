"""The parts of `benchmarks/ood.py`.

`settings` says what a run is, `store` keeps finished ones on disk, `data`
holds the images, `methods` what is trained, `posthoc` the detectors that are
fitted afterwards, `runs` trains and evaluates, `report` writes the tables and
`figures` the pictures.
"""
