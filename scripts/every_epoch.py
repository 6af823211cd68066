"""cifar.py, with the checkpoint of every epoch kept beside the last one, as epoch01.pth.tar and so on.

    python scripts/every_epoch.py --dataset digits --arch lenet --epochs 5

So what is measured of a checkpoint can be drawn over the epochs. It is also an example of a run that does more.
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import cifar  # noqa: E402
from utils.run import Run  # noqa: E402
from utils.script import run_script  # noqa: E402


class EveryEpoch(Run):
    def end_epoch(self, epoch, trained, tested):
        super().end_epoch(epoch, trained, tested)
        self.save(f'epoch{epoch + 1:02d}.pth.tar')


if __name__ == '__main__':
    cifar.Run = EveryEpoch
    run_script(cifar.main)
