"""What the scripts stand on. Imports maskrl, never the other way.

The run       settings     a run's settings, their limits and presets
              options      the command line; from options to a Run
              summary      what a run says before it begins; --quick
              run          folder, lock, log, checkpoints and --resume
              progress     how long a run will take; TensorBoard
              signals      Ctrl-C and SIGTERM
              choices      what a run was begun with, compared by --resume
              errors       messages and exit codes
              files        writing and reading files safely
              precision    bfloat16 and checkpointing, put around a model
              distributed  several processes, started by torchrun
              devices      which GPUs there are, and what they can do
Images        data         the shapes, folders, classes, splits
              datasets     MNIST, CIFAR and others that are downloaded
              images       reading image files
              cache        decoded images and latents, kept in files
              latents      what a generator of latents learns
              kl16         the autoencoder of MAR's released models
              released     files in MAR's own format
Judging       damage       ways to damage an image
              quality_net  the network behind reward and judge
              rewards      what --reward may name
              pretrained   CLIP and torchvision: rewards and features
              plugins      functions of the user's
              judge        Frechet distance, precision, recall
              monitors     what is logged while a training goes on
              report       the table at the end, metrics.json
              pictures     grids, films, curves
              timing       seconds, measured side by side
Sampling      sampling     what sample.py is asked for, checked
              inpaint      the image and mask of --inpaint
              lazymar      attention caching
              bench        which idea saves how much time
Teaching      lessons      what tutorial.ipynb says with, and its upkeep
              lesson_pictures  what it draws with
studies/      one file for each measurement in assets/results
"""
