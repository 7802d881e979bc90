//! Backend `hosted`: the guest tests' code in this process, against the same engine, without a VM.
//!
//! For property tests, fuzzing, and machines without KVM. What a guest touches goes through
//! [`Td::read`] and [`Td::write`], so that wrong-alias checks hold; there is no instruction that it
//! could crash with.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Instant;

use mapgpa_abi::channel::{header, tag};
use mapgpa_abi::tdcall::Regs;
use mapgpa_abi::{Alias, Direction, PAGE_SIZE};
use mapgpa_guests::driver;
use mapgpa_kit::Td;

use super::{End, Rendezvous, Setup, Wake};
use crate::engine::{Engine, Event, EventSink, Flow, Settings};
use crate::interrupt;
use crate::memory::{HostWork, Memory, MemoryError};
use crate::pagemap::{PageMap, Pages};
use crate::platform::{Bare, NoCpu};
use crate::tdcall;

/// TDCALLs between two looks at the clock and at Ctrl-C.
const LOOK_EVERY: u32 = 1024;

/// What a guest has written; a page never written reads as zero.
#[derive(Debug, Default)]
pub struct HostedMemory {
    private: AliasMemory,
    shared: AliasMemory,
}

/// Memory seen through one alias. Ordered, so that a conversion finds what it discards without a look
/// at the rest.
#[derive(Debug, Default)]
struct AliasMemory {
    /// Words by GPA in bytes, without the shared bit.
    words: BTreeMap<u64, u64>,
    /// Pages touched against their state: like a VM's, they are there from then on, and further
    /// touches go unseen until the page changes state.
    filled: BTreeSet<u64>,
}

impl AliasMemory {
    fn forget(&mut self, run: Pages) {
        let gone = run.gpa()..run.end() * PAGE_SIZE;
        while let Some((&gpa, _)) = self.words.range(gone.clone()).next() {
            self.words.remove(&gpa);
        }
        while let Some(&page) = self.filled.range(run.first..run.end()).next() {
            self.filled.remove(&page);
        }
    }
}

impl HostedMemory {
    fn of(&mut self, alias: Alias) -> &mut AliasMemory {
        match alias {
            Alias::Private => &mut self.private,
            Alias::Shared => &mut self.shared,
        }
    }
}

impl Memory for HostedMemory {
    fn convert(
        &mut self,
        run: Pages,
        _: Direction,
        keep: bool,
        _: &PageMap,
    ) -> Result<(), MemoryError> {
        self.shared.forget(run);
        if !keep {
            self.private.forget(run);
        }
        Ok(())
    }

    fn accept(&mut self, run: Pages, _: &PageMap) -> Result<(), MemoryError> {
        self.private.forget(run);
        Ok(())
    }
}

/// A run that could not be done.
#[derive(Debug, thiserror::Error)]
pub enum HostedError {
    /// Guest memory could not be converted.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// There is no thread for a vCPU.
    #[error("no thread can be started")]
    Thread(#[source] std::io::Error),
}

/// What ends a guest's stack.
struct Ended;

/// The state that the vCPUs of a run share.
struct Run<S> {
    engine: Mutex<Engine<HostedMemory, S>>,
    meeting: Rendezvous,
    deadline: Instant,
    interrupted: std::sync::atomic::AtomicBool,
    error: Mutex<Option<HostedError>>,
}

impl<S> Run<S> {
    /// Ends the run because of `error`, unless another was first.
    fn fail(&self, error: HostedError) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.meeting.stop();
    }

    fn engine(&self) -> MutexGuard<'_, Engine<HostedMemory, S>> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A vCPU.
struct Vcpu<'a, S> {
    run: &'a Run<S>,
    index: u32,
    shared_bit: u64,
    tdcalls: u64,
    look_in: u32,
}

/// Runs the built-in guest that the parameters name, until it ends or the time-out.
///
/// # Errors
/// The pages that are to be shared from the start cannot be set up.
pub fn run<S: EventSink + Send>(
    setup: &Setup<'_>,
    settings: Settings,
    sink: S,
) -> Result<End<S, HostedError>, HostedError> {
    let vcpus = settings.vcpus;
    let shared_bit = mapgpa_abi::shared_bit(settings.gpaw);
    let mut engine = Engine::new(settings, HostedMemory::default(), sink);
    if let Some(pages) = setup.shared {
        engine.preset_shared(pages)?;
    }
    let run = Run {
        engine: Mutex::new(engine),
        meeting: Rendezvous::new(vcpus),
        deadline: Instant::now() + setup.timeout,
        interrupted: false.into(),
        error: Mutex::new(None),
    };
    let vcpu = |index: u32| {
        let mut td = Vcpu { run: &run, index, shared_bit, tdcalls: 0, look_in: LOOK_EVERY };
        // A guest ends anywhere in its own code: by unwinding out of it. At its regular end there is
        // no need to.
        let ended =
            catch_unwind(AssertUnwindSafe(|| driver::test(&mut td, &setup.params, index.into())));
        match ended {
            Ok(success) => td.exit(success),
            Err(payload) if payload.is::<Ended>() => {}
            Err(payload) => {
                run.meeting.leave();
                resume_unwind(payload)
            }
        }
        run.meeting.leave();
        td.tdcalls
    };
    let tdcalls = if vcpus == 1 {
        vcpu(0)
    } else {
        std::thread::scope(|scope| {
            let vcpu = &vcpu;
            let mut threads = Vec::with_capacity(vcpus);
            for (_, index) in (0..vcpus).zip(0..) {
                match Builder::new().spawn_scoped(scope, move || vcpu(index)) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        run.fail(HostedError::Thread(error));
                        break;
                    }
                }
            }
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|payload| resume_unwind(payload)))
                .sum()
        })
    };
    let engine = run.engine.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(End {
        sink: engine.end().1,
        exits: tdcalls,
        work: HostWork::default(),
        interrupted: run.interrupted.into_inner(),
        checks_off: &[],
        error: run.error.into_inner().unwrap_or_else(PoisonError::into_inner),
    })
}

impl<S: EventSink> Vcpu<'_, S> {
    /// What [`mapgpa_kit::report::exit`] says, from outside of the guest.
    fn exit(&mut self, success: bool) {
        self.tdcalls += 1;
        let word = header(tag::EXIT, u32::from(!success));
        if self.run.engine().channel_word(self.index, word) == Flow::Stop {
            self.run.meeting.stop();
        }
    }

    fn end(&self) -> ! {
        // No message, and no hook: this is how a guest's code is left, not a failure.
        resume_unwind(Box::new(Ended))
    }

    fn end_run(&self) -> ! {
        self.run.meeting.stop();
        self.end()
    }

    fn woken(&self, wake: Wake) {
        match wake {
            Wake::Met => {}
            Wake::Over => self.end(),
            Wake::Timeout => {
                self.run.engine().emit(&Event::Timeout);
                self.end_run()
            }
            Wake::Interrupted => {
                self.run.interrupted.store(true, std::sync::atomic::Ordering::Relaxed);
                self.end_run()
            }
        }
    }

    fn follow(&mut self, flow: Flow) {
        match flow {
            Flow::Continue | Flow::Idle => {}
            Flow::Barrier => {
                let wake = self.run.meeting.wait(self.run.deadline);
                self.woken(wake);
            }
            Flow::Exit => self.end(),
            Flow::Stop => self.end_run(),
        }
    }

    fn look(&mut self) {
        self.look_in = LOOK_EVERY;
        let wake = if self.run.meeting.is_over() {
            Wake::Over
        } else if interrupt::requested() {
            Wake::Interrupted
        } else if Instant::now() >= self.run.deadline {
            Wake::Timeout
        } else {
            Wake::Met
        };
        self.woken(wake);
    }

    fn touch(&mut self, alias: Alias, gpa: u64) -> MutexGuard<'_, Engine<HostedMemory, S>> {
        let raw = match alias {
            Alias::Private => gpa,
            Alias::Shared => gpa | self.shared_bit,
        };
        let page = gpa / PAGE_SIZE;
        let mut engine = self.run.engine();
        let filled = engine.memory().of(alias).filled.contains(&page);
        if !filled && let Err(flow) = engine.touch(raw) {
            engine.memory().of(alias).filled.insert(page);
            drop(engine);
            self.follow(flow);
            return self.run.engine();
        }
        engine
    }
}

impl<S: EventSink> Td for Vcpu<'_, S> {
    fn tdcall(&mut self, regs: &mut Regs) {
        self.tdcalls += 1;
        self.look_in -= 1;
        if self.look_in == 0 {
            self.look();
        }
        let flow = tdcall::tdcall(&mut *self.run.engine(), self.index, regs, &Bare, &NoCpu);
        match flow {
            Ok(flow) => self.follow(flow),
            Err(error) => {
                self.run.fail(error.into());
                self.end()
            }
        }
    }

    fn read(&mut self, alias: Alias, gpa: u64) -> u64 {
        let mut engine = self.touch(alias, gpa);
        engine.memory().of(alias).words.get(&gpa).copied().unwrap_or(0)
    }

    fn write(&mut self, alias: Alias, gpa: u64, value: u64) {
        let mut engine = self.touch(alias, gpa);
        engine.memory().of(alias).words.insert(gpa, value);
    }

    fn stop(&mut self) -> ! {
        self.end()
    }
}
