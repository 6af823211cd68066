"""A training run, all but the experiment: its folder, log, checkpoints, progress, and what it says when it stops."""
import functools
import math
import os
import shlex
import signal
import time

import torch

from models.base import count_parameters
from utils import after_steps, checkpoint, device as devices, distributed, flags, folders, methods, metrics, output
from utils import resume, schedule, strength
from utils.averages import average_of_weights, estimate_statistics
from utils.bar import ProgressLine
from utils.batches import reader_lost
from utils.errors import Stopped, UserError, one_line
from utils.eval import Meter, metrics_line, quantities
from utils.files import NotWritten, digest, write_json
from utils.logger import Logger, plot_log
from utils.parts import Batch, check_parts, single_image_explained
from utils.pixels import Pixels


class Run:
    """One training run, from where `state` is to the last epoch.

        with Run(args, state, model, optimizer, batches) as run:
            for epoch in run.epochs():
                for step, batch in run.steps(epoch):
                    ...                                              # a step of the optimizer
                    run.meter.update(logits, batch.targets, loss)
                run.end_epoch(epoch, trained, tested)
            run.report(test)

    args: the flags, validated and filled in. state: a checkpoint, or the beginning of one with 'script', 'epoch',
    'network', 'classes', 'mean' and 'std'. batches: {'train': ..., 'test': ...} and perhaps 'val', as `Batches` or
    `ImageBatches`.

    network           the model to train: compiled with --compile, in DistributedDataParallel among several processes
    to_test           the model to test: with --ema the moving average of the weights, with --swa their mean
    average           the AveragedModel that `to_test` is the module of, or None; a script may set one of its own
    pixels            what black and white are in its images, for --adversarial
    selection         the split that chooses the best epoch: 'val' if there is one, else 'test'
    test_every        it is tested on after so many epochs, and after the last
    steps_per_epoch   batches in an epoch, of all processes together
    told_before_steps modules of the network that have `before_step`, see utils/methods.py
    tells_criterion   whether the loss of a method changes with the position
    scaled_options    options of the optimizer that the strength of the methods scales
    meter             the `Meter` of the epoch that `steps` runs through

    Nothing is written before the `with` block is entered. Leaving it on SIGINT or SIGTERM says how to resume.
    """

    def __init__(self, args, state, model, optimizer, batches):
        self.args, self.state, self.model, self.optimizer, self.batches = args, state, model, optimizer, batches
        self.selection = 'val' if 'val' in batches else 'test'
        self.steps_per_epoch = len(batches['train'])
        after_steps.tell_if_none_does(optimizer, [*model.modules()], f'--method {" ".join(args.method)}')
        self.average = average_of_weights(args, state, model, optimizer)
        self.seen = after_steps.watch(optimizer)
        self.pixels = Pixels(batches['train'].mean, batches['train'].std) if args.adversarial else None
        compiled = torch.compile(model) if args.compile else model
        self.network = distributed.data_parallel(compiled)
        self.compiled = compiled
        self.in_folder = functools.partial(os.path.join, args.checkpoint)
        steps = args.epochs * self.steps_per_epoch
        if args.method and strength.at(steps - 1, steps, args) == 0:
            start = ' and '.join(f'{flag} {share:g}' for flag, share in (
                ('--method-start', args.method_start), ('--method-ramp', args.method_ramp)) if share)
            raise UserError(f'with {start} no step is left to --method {" ".join(args.method)}, whose strength is 0 '
                            f'in the last of {steps} too')
        for flag, share in methods.begins(args).items():
            if (steps - 1) / steps < share:
                raise UserError(f'{flag} {share:g} leaves no step to what begins there: the last of {steps} begins '
                                'before it')
        for group in optimizer.param_groups:
            schedule.made_with(group)
        self.scaled_options = methods.scaled_options(args)
        methods.check_optimizer(args, optimizer)
        self.tells_criterion = methods.by_position(args, 'loss_term')
        self.told_before_steps = [module for module in model.modules() if hasattr(module, 'before_step')]
        self.meter = self.bar = self.logger = self.setting = None
        self.changes = []  # of the setting, in the middle of training
        self.predictions = None  # of the last epoch, if it was tested on the test images
        self.drawn, self.drawing_failed = time.perf_counter(), False
        self.read_again = 2  # checkpoints: the first has no state of the optimizer yet
        self.left = None  # the epoch that the loop has left, by a break or after its last step
        self.in_epoch = False  # from its first batch to `end_epoch`
        self.kept = dict(state)  # what `_keep` has put into `state`, or the checkpoint had
        self.step = self.steps_made = 0
        self.seconds = 0.0  # of training in the epoch that is running or has just run
        self.rate = math.nan  # at the beginning of that epoch
        args.watch()  # from here on what is set is the loop's

    def __enter__(self):
        args, state = self.args, self.state
        checkpoint.begin_random_state(state, args.seed)
        names = quantities(state['network']['num_classes'])
        behind = (state['epoch'] - args.start_epoch) * self.steps_per_epoch + state.get('step', 0)
        self.steps_made = state.get('steps', behind)
        columns = ['Epoch', 'Learning Rate', *(f'{part} {name}' for part in ('Train', self.selection.title())
                                               for name in names), 'Seconds']
        old_rows = resume.rows_behind(args, state, columns)
        self.setting = resume.setting(args, state)
        begun = [(row[1], int(row[0]) - 1) for row in old_rows]
        if state.get('step') and state.get('rate') is not None:
            begun.append((state['rate'], state['epoch']))
        changes = resume.changes(args, state, self.setting, [
            (rate, self.learning_rate(epoch * self.steps_per_epoch)) for rate, epoch in begun])
        if changes:  # flags win over what the loop has set
            schedule.reset(self.optimizer, {*args.regime[0], *self.scaled_options})
        self.changes = [*state.get('changes', []), *changes]
        state['args'], state['optimizer_class'] = args.inherited, checkpoint.class_name(self.optimizer)
        state['given'] = resume.given(args, state)
        distributed.barrier()
        state.setdefault('best', {'top1': -1.0, 'epoch': 0})
        if distributed.is_first():
            output.enter(args, finished=state['epoch'] >= args.epochs, without_best=resume.is_ahead(args, state))
            described = self._described()
            write_json(self.in_folder('args.json'), {**described, 'check sum': digest(described)})
            self.logger = Logger(self.in_folder('log.txt'), columns, old_rows)
            if not os.path.exists(self.in_folder(output.BEST)):
                state['best'] = {'top1': -1.0, 'epoch': 0}
        state['best'] = distributed.broadcast(state['best'])
        if self.test_every > 1:
            self.say(f'tested after every {self.test_every} epochs and after the last; --test-every 1 tests after each')
        return self

    def __exit__(self, kind, error, traceback):
        if self.bar:
            self.bar.finish()
        if isinstance(error, (UserError, Stopped)) and not isinstance(error, NotWritten):
            self._draw_curves()
        output.release(self.args.checkpoint)
        if isinstance(error, RuntimeError) and 'killed by signal: Terminated' in str(error):
            raise self._with_sentence(Stopped(signal.SIGTERM)) from error  # a process that reads images got it first
        if lost := reader_lost(error):
            raise UserError(f'{lost}; the finished epochs are kept, resume with: {self._how_to_resume()}') from error
        if isinstance(error, ValueError):
            with single_image_explained(self.args, len(self.batches['train'].labels)):
                raise error
        if isinstance(error, Stopped):
            self._with_sentence(error)
        if isinstance(error, BrokenPipeError):
            raise UserError(f'nothing reads the output any more ({one_line(error)}); the finished epochs are kept, '
                            f'resume with: {self._how_to_resume()}') from error
        if isinstance(error, NotWritten):
            raise UserError(f'{error}; the finished epochs are kept, resume with: {self._how_to_resume()}') from error

    def epochs(self):
        """The indices of the epochs that are left, from 0."""
        if not self.state.get('step'):
            self.save(output.LAST)  # a run that is interrupted in its first epoch can be resumed too
        yield from range(self.state['epoch'], self.args.epochs)

    def steps(self, epoch):
        """(step, `Batch`) of the batches of an epoch that are left; the step counts from the beginning of training.

        Counts time, shows progress, writes the checkpoints of --checkpoint-every. Raises UserError for a loss that is
        not finite, here or in another process, at the latest after the last batch.
        """
        args, batches, resumed = self.args, self.batches['train'], self.state.get('step', 0)
        self.meter = Meter(self.steps_per_epoch, batches.num_classes, batches.device)
        if resumed:
            self.meter.load(self.state['meter'], local=distributed.is_first())
        asked = time.perf_counter()
        began = asked - self.state.get('seconds', 0.0)
        held = self.state.get('rate') if resumed else None
        self.rate, self.step = math.nan if held is None else held, epoch * self.steps_per_epoch + resumed
        self._keep(step=0, meter=None, seconds=0.0, rate=None)  # the next epoch begins at its first batch
        if self.setting:
            self._keep(trained_with=self.setting, changes=self.changes)
        self.in_epoch, steps_seen = True, self.seen and self.seen.steps
        with ProgressLine(f'train {epoch + 1}/{args.epochs}', self.steps_per_epoch - resumed) as self.bar:
            try:
                for index, (images, targets) in enumerate(batches.shuffled(args.seed, epoch, resumed), resumed):
                    data_seconds = time.perf_counter() - asked
                    self.step = epoch * self.steps_per_epoch + index
                    self.steps_made += 1
                    yield self.step, Batch(images, targets, batches.images_in(index))
                    self.meter.end_batch(index)
                    self._keep_rate(epoch)
                    self.seconds, done = time.perf_counter() - began, index + 1
                    if self.bar.advance(self.meter, data_seconds):
                        self._check_losses(self.meter, epoch)
                    if args.checkpoint_every and done % args.checkpoint_every == 0 and done < self.steps_per_epoch:
                        whole = self.meter.of_all_processes()
                        self._check_losses(whole, epoch)
                        self.save(output.LAST, step=done, meter=whole.state(), seconds=self.seconds, rate=self.rate)
                    asked = time.perf_counter()
            finally:
                self.left = epoch
        if self.seen and self.seen.steps == steps_seen and sum(self.meter.sizes) and not resumed:
            raise UserError(f'the optimizer that Run was given, {type(self.optimizer).__name__}, has made no step in '
                            f'epoch {epoch + 1}; one of your own is made in main, in the place of '
                            'methods.build_optimizer, so that checkpoints and log are of it')
        self._end_steps()

    def _end_steps(self):
        """What follows the last step of an epoch, also where the loop has left it with a break."""
        if self.left is None:
            return
        epoch, self.left, self.bar = self.left, None, None
        self._keep_rate(epoch)
        for name in self.args.not_read():
            self.say(f'the loop has set args.{name}, which nothing has read since; what was made from it before the '
                     'loop stays as it was')
        self._check_losses(self.meter.of_all_processes(), epoch)
        if self.args.swa is not None and (epoch + 1) / self.args.epochs > self.args.swa:
            self.average.update_parameters(self.model)
            estimate_statistics(self.average, self.batches['train'], self.args, epoch)

    @property
    def averaging(self):
        """Whether the weights to test are an average; with --swa only from its start on."""
        return self.average is not None and (self.args.swa is None or self.average.n_averaged > 0)

    @property
    def to_test(self):
        return self.average.module if self.averaging else self.compiled

    @property
    def test_every(self):
        tested, trained = (len(self.batches[part].labels) for part in (self.selection, 'train'))
        return self.args.test_every or -(-tested // trained)

    def test_meter(self, epoch):
        """What counts the test after an epoch, or None if this epoch is not tested, see --test-every.

        After the last epoch it keeps the predictions for the report, unless there are validation images.
        """
        self._end_steps()
        selected, last = self.batches[self.selection], epoch + 1 == self.args.epochs
        if not last and (epoch + 1) % self.test_every:
            return None
        if not last or self.selection != 'test':
            return Meter(len(selected), selected.num_classes, selected.device)
        self.predictions = metrics.Predictions(len(selected), selected.num_classes, selected.device)
        return self.predictions

    def say(self, text):
        """Print a line above the progress bar; in the first process only."""
        if self.bar:
            self.bar.say(text)
        else:
            print(text, flush=True)

    def end_epoch(self, epoch, trained, tested):
        """Write the log, the checkpoints and the curves, and print a line.

        trained, tested: what `Meter.read_all` gave in training, and in the test on the selection split, or None.
        """
        self._end_steps()
        self.in_epoch = False
        part, rate = self.selection, self.rate
        folders.report_skipped(self.batches, self.in_folder('skipped.txt'))
        if tested and not math.isfinite(tested['Loss']):
            raise UserError(f'the {part} loss became {tested["Loss"]} after epoch {epoch + 1}, at learning rate '
                            f'{rate:.4g}, {self._last_good(epoch)}')
        self.state['epoch'] = epoch + 1
        if self.logger:
            names, in_log = self.meter.quantities, [trained, tested or {}]
            if others := sorted(set().union(*in_log) - {*names}):
                self.say(f'log.txt has no column for {", ".join(others)}')
            self.logger.append([epoch + 1, rate, *(values.get(name, math.nan) for values in in_log for name in names),
                                self.seconds])
        if tested and tested['Top-1'] > self.state['best']['top1']:
            self.state['best'] = {'top1': tested['Top-1'], 'epoch': epoch + 1}
            self.save(output.BEST)
        self.save(output.LAST)
        if time.perf_counter() - self.drawn > 30:
            self._draw_curves()
        test_line = f'| {metrics_line(part, tested)} ' if tested else ''
        self.say(f'epoch {epoch + 1}/{self.args.epochs} | lr {rate:.4g} | {metrics_line("train", trained)} '
                 f'{test_line}| {self.seconds:.1f} s')

    def learning_rate(self, step):
        """The rate of the optimizer's first parameter group at `step`; NaN if it has none."""
        group = self.optimizer.param_groups[0]
        return schedule.group_rate(group, step, self.steps_per_epoch, self.args) if 'lr' in group else math.nan

    def _keep_rate(self, epoch):
        """Keep the rate at the first step of an epoch, of which `self.step` has just been made, once for each."""
        if not math.isnan(self.rate):
            return
        self.rate = rate = float(self.optimizer.param_groups[0].get('lr', math.nan))
        if rate == self.learning_rate(self.step) or math.isnan(rate):
            self.rate = float(self.learning_rate(epoch * self.steps_per_epoch))
        else:
            self.state['own_rate'] = True  # the script's, and not that of the flags

    def save(self, name, step=0, meter=None, seconds=0.0, rate=None):
        """Write the checkpoint `name`. step: batches of the epoch that are done, counted by `meter` in `seconds`; rate:
        with which it began.
        """
        if self.in_epoch and not step:
            raise UserError(f'run.save("{name}") within an epoch would be resumed from its beginning; call it after '
                            'run.end_epoch, or let --checkpoint-every write a checkpoint within epochs')
        random_states = distributed.all_gather(checkpoint.random_state())
        self._keep(state_dict=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                   random_state=random_states[0], other_random_states=random_states[1:],
                   ema=self.average.state_dict() if self.averaging else None,
                   step=step, meter=meter, seconds=seconds, rate=rate, steps=self.steps_made)
        if distributed.is_first():
            self._keep(log=[line[:-1] for line in self.logger.lines])  # all but the seconds
            checkpoint.save(self.in_folder(name), self.state)
            if self.read_again:
                self.read_again -= 1
                checkpoint.check_written(self.in_folder(name))

    def _keep(self, **values):
        """Put these into `state`; UserError where the script has put something of its own under such a name."""
        for name in values:
            if self.state.get(name) is not self.kept.get(name):
                raise UserError(f"state['{name}'] is the run's own, which would overwrite it; put yours under another "
                                'name')
        self.state.update(values)
        self.kept.update(values)

    def report(self, test):
        """The result: of the last epoch, or with --val-split of the epoch that was best on the validation images.

        test: (batches, model, args, meter) -> what the meter has counted, as the function of the script.
        """
        best, epoch, batches = self.state['best'], self.state['epoch'], self.batches['test']
        chosen_by_validation = self.selection == 'val'
        if chosen_by_validation:
            chosen = checkpoint.read(self.in_folder(output.BEST)) if distributed.is_first() else None
            chosen = distributed.broadcast(chosen)
            best, epoch = chosen['best'], chosen['epoch']
            uncompiled = self.average.module if self.averaging else self.model
            checkpoint.load_weights(uncompiled, checkpoint.weights_to_test(chosen), self.in_folder(output.BEST))
        predictions = self.predictions
        if predictions is None:
            predictions = metrics.Predictions(len(batches), batches.num_classes, batches.device)
            test(batches, self.to_test, self.args, predictions)
        tested = predictions.read_all('test')
        probabilities, targets = predictions.of_all_images()
        if not distributed.is_first():
            return
        by_class, confusion = metrics.of_classes(probabilities, targets)
        self._draw_curves()
        self._draw(metrics.write_confusion, confusion, self.state['classes'], self.in_folder('confusion.csv'),
                   self.in_folder('confusion.png'))
        seconds = [float(row[-1]) for row in self.logger.lines[1:] if row[-1] != 'nan']
        result = {'epoch': epoch, **metrics.in_result(tested, by_class), 'best': best,
                  'chosen by': 'validation' if chosen_by_validation else 'last epoch',
                  'test images': len(targets), 'parameters': count_parameters(self.model),
                  'steps': self.steps_made,
                  'seconds': sum(seconds) if len(seconds) == len(self.logger.lines) - 1 else None,
                  'seconds per epoch': sum(seconds) / max(len(seconds), 1)}
        result['check sums'] = output.check_sums(result, self.logger.lines)
        write_json(self.in_folder(output.RESULT), result)
        note = (f'chosen by validation top-1 {best["top1"]:.2f}%' if chosen_by_validation
                else f'best test epoch {best["epoch"]}: {best["top1"]:.2f}%')
        print(f'\nepoch {epoch} | {metrics_line("test", tested)} | {note}')
        print(metrics.class_report(self.state['classes'], by_class))
        for name, files in (('log', 'log.txt'), ('curves', 'log.png log.pdf'), ('checkpoint', output.LAST),
                            ('best', output.BEST), ('confusion', 'confusion.csv confusion.png'),
                            ('result', 'result.json')):
            print(f'{name:12}', '  '.join(self.in_folder(file) for file in files.split()))

    def _described(self):
        """What args.json holds."""
        train = self.batches['train']
        derived = ('given', 'inherited', 'regime', 'found')
        return {**{name: value for name, value in vars(self.args).items() if name not in derived},
                'script': self.state['script'], 'as given': self.args.inherited, 'changes': self.changes,
                'network': self.state['network'], 'optimizer class': self.state['optimizer_class'],
                'optimizer options': methods.own_options(self.args, self.model, self.optimizer),
                'parameters': count_parameters(self.model), 'training images by class': train.class_counts,
                'processes': distributed.world_size(), 'environment': devices.environment(train.device)}

    def _check_losses(self, meter, epoch):
        """UserError if a batch of this epoch had a loss that is not a number or infinite."""
        bad = meter.first_bad_batch()
        if bad:
            rate = self.learning_rate(epoch * self.steps_per_epoch + bad[0])
            raise UserError(f'the loss became {bad[1]} in epoch {epoch + 1}, batch {bad[0] + 1} of '
                            f'{self.steps_per_epoch}, at learning rate {rate:.4g}, {self._last_good(epoch)}')

    def _last_good(self, epoch):
        left = 'from before that' if self.args.checkpoint_every else f'as epoch {epoch} left it'
        return (f'so the run stops; {self.in_folder(output.LAST)} is {left}; '
                'try a smaller --lr, a --warmup or a --clip-norm')

    def _with_sentence(self, stop):
        stop.sentence = f'Stopped; the finished epochs are kept. Resume with: {self._how_to_resume()}'
        return stop

    def _draw_curves(self):
        if self.logger and len(self.logger.lines) > 1:
            self._draw(plot_log, self.in_folder('log.txt'), self.in_folder('log.png'), self.in_folder('log.pdf'))
            self.drawn = time.perf_counter()

    def _draw(self, function, *arguments):
        """Draw a picture; whatever goes wrong with it is said once, and the run goes on."""
        try:
            function(*arguments)
        except Exception as error:
            if not self.drawing_failed:
                self.say(f'a picture cannot be drawn ({one_line(error)[:200]}); the run goes on without')
            self.drawing_failed = True

    def _how_to_resume(self):
        path = shlex.quote(self.in_folder(output.LAST))
        if distributed.active():
            return f'the same torchrun and {self.state["script"]} --resume {path}'
        return f'python {self.state["script"]} --resume {path}'


def validate(args, state, regime, parser, model):
    """Refuse batches, schedules and methods that are invalid, and fill in what is not given.

    regime: the model's. model: what the methods' optimizers are tried with, before the data are read.
    """
    # What is derived below from other flags is derived again when the run is resumed, perhaps with other flags.
    args.inherited = {name: value for name, value in vars(args).items()
                      if name in parser.names() and flags.meaning(name).resume != flags.START}
    check_parts(args, parser)
    if args.ema and args.swa is not None:
        parser.error('--ema and --swa exclude each other: both say which average of the weights to test')
    if args.adversarial == 0:
        parser.error('--adversarial 0 changes no image; give a number above 0, such as 8/255')
    try:
        schedule.fill_in(args, regime, parser, methods.default_lr(args))
        if state and not args.evaluate:
            resume.check_epochs(state, args, parser)
        blank = torch.nn.Linear(1, 1)
        methods.build_optimizer(args, model, steps_per_epoch=1, parameters=blank.parameters())
    except ValueError as error:
        parser.error(str(error))


def headline(args, architecture, model, device):
    """What a run says of itself first. architecture: name -> value, of what `network` in a checkpoint holds."""
    processes = f' | {distributed.world_size()} processes' if distributed.active() else ''
    return (f'{", ".join(f"{name} {value}" for name, value in architecture.items())} '
            f'| {count_parameters(model) / 1e6:.2f} million parameters | method: {" ".join(args.method) or "none"} '
            f'| {args.precision} on {device.type} | seed {args.seed}{processes}')
