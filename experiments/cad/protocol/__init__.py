"""The published protocols for edited text-to-image models: thin drivers on the libraries that the
field measures with.

    prompts -> pictures of original and edited pipeline at equal noise -> measure -> table

objects     Imagenette classes, named by an ImageNet classifier         (transformers)
nudity      I2P prompts, exposed parts found by NudeNet                 (nudenet)
styles      artists, LPIPS between the two pictures of a prompt         (lpips.py)
retention   COCO captions, CLIP score and Frechet distance              (transformers, torchmetrics)

`prompts` reads what is asked, `pictures` draws and keeps it, `run` is the one way through all four;
a protocol is a class with `asks` and `measure` (`run.Protocol`). The measuring networks are loaded
before anything is drawn, so that a missing one is told at once.
"""
