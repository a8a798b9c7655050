//! The bounded queue, and the thread that takes its images through a running batch.
//!
//! One thread owns the engine's batch. Between steps it lets images of the queue's head join as long as they fit the
//! batch; one of another model, size or the like waits until the batch is empty. So order is kept, and no image waits
//! for more than those before it. An image whose receiver is gone is taken out before the next step.

use crate::backend::{Backend, Batch, Event, Kind, Picture, Problem, Work};
use crate::metrics::Metrics;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// News about an image.
#[derive(Clone, Debug)]
pub enum Update {
    /// It has taken this many steps of `total`. A preview comes with it if one was due.
    Step {
        /// Steps done.
        done: usize,
        /// Steps in all.
        total: usize,
        /// The PNG of the image as it is.
        preview: Option<Vec<u8>>,
    },
    /// It is done, and has waited in the queue and been in work for so long.
    Finished {
        /// The picture.
        picture: Picture,
        /// Time in the queue.
        queued: Duration,
        /// Time in the batch.
        worked: Duration,
    },
}

/// The news about an image, of which an error or [`Update::Finished`] is the last.
pub type Receiver = UnboundedReceiver<Result<Update, Problem>>;
type Sender = UnboundedSender<Result<Update, Problem>>;

/// The next news about an image.
///
/// # Errors
/// The image's problem, or [`Kind::Internal`] if the thread of the batch has ended.
pub async fn news(receiver: &mut Receiver) -> Result<Update, Problem> {
    receiver.recv().await.unwrap_or_else(|| Err(Problem::new(Kind::Internal, "the batch has ended; ask again")))
}

/// Settings of a client for its images.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes {
    /// The time at which an image that is not done is given up.
    pub deadline: Option<Instant>,
    /// Number of previews of each image.
    pub previews: usize,
}

struct Waiting {
    work: Work,
    wishes: Wishes,
    since: Instant,
    updates: Sender,
}

/// An image in the batch.
struct InWork {
    wishes: Wishes,
    since: Instant,
    began: Instant,
    /// Previews that were sent.
    shown: usize,
    updates: Sender,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Waiting>,
    /// Images in work.
    working: usize,
    closing: bool,
    /// Mean seconds of an image in the batch, over the latest ones.
    mean_seconds: f64,
}

/// The queue. Cloning shares it.
#[derive(Clone)]
pub struct Queue(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    capacity: usize,
    metrics: Arc<Metrics>,
}

impl Queue {
    /// A queue for up to `capacity` waiting images, and the thread that serves it.
    ///
    /// # Errors
    /// The system's, if no thread can be started.
    pub fn start(
        backend: Arc<dyn Backend>,
        capacity: usize,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<(Self, std::thread::JoinHandle<()>)> {
        let queue = Queue(Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), capacity, metrics }));
        let worker = Worker { queue: queue.clone(), backend, batch: None, images: HashMap::new() };
        let ended = Ended(queue.clone());
        let work = move || {
            let _ended = ended;
            worker.run();
        };
        let thread = std::thread::Builder::new().name("batch".into()).spawn(work)?;
        Ok((queue, thread))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Queues all images of a request, or none. Each has a receiver of its own; an image whose receiver is dropped is
    /// cancelled.
    ///
    /// # Errors
    /// [`Kind::Busy`] with the time after which to try again, [`Kind::Unavailable`].
    pub fn submit(&self, works: Vec<Work>, wishes: Wishes) -> Result<Vec<Receiver>, Problem> {
        let mut state = self.lock();
        if works.len() > self.0.capacity {
            let message = format!("{} pictures are more than the queue of {} holds", works.len(), self.0.capacity);
            return Err(Problem::invalid("n", message));
        }
        if state.closing {
            return Err(Problem::new(Kind::Unavailable, "the server is about to end; ask another one"));
        }
        // The places of clients that have left are free.
        state.waiting.retain(|waiting| {
            let left = waiting.updates.is_closed();
            if left {
                self.0.metrics.cancelled("client");
            }
            !left
        });
        if state.waiting.len() + works.len() > self.0.capacity {
            let wait = (state.mean_seconds * (1 + state.waiting.len()) as f64).ceil().clamp(1.0, 3600.0);
            let message =
                format!("{} images wait already, and the queue holds {}", state.waiting.len(), self.0.capacity);
            return Err(Problem { retry_after: Some(wait as u64), ..Problem::new(Kind::Busy, message) });
        }
        let since = Instant::now();
        let receivers = works.into_iter().map(|work| {
            let (updates, receiver) = unbounded_channel();
            state.waiting.push_back(Waiting { work, wishes, since, updates });
            receiver
        });
        let receivers = receivers.collect();
        self.0.metrics.queue_size(state.waiting.len());
        self.0.changed.notify_all();
        Ok(receivers)
    }

    /// The number of images that wait, and of those in work.
    pub fn load(&self) -> (usize, usize) {
        let state = self.lock();
        (state.waiting.len(), state.working)
    }

    /// True if no more images are taken: the server is about to end, or the thread of the batch has ended.
    pub fn is_closed(&self) -> bool {
        self.lock().closing
    }

    /// Takes no more images. The thread ends when those that it has are done.
    pub fn close(&self) {
        self.lock().closing = true;
        self.0.changed.notify_all();
    }
}

/// Closes the queue when the thread of the batch ends, whatever ended it.
struct Ended(Queue);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.close();
    }
}

struct Worker {
    queue: Queue,
    backend: Arc<dyn Backend>,
    /// The batch of the moment.
    batch: Option<Box<dyn Batch>>,
    images: HashMap<u64, InWork>,
}

impl Worker {
    fn run(mut self) {
        while self.wait() {
            self.admit();
            self.drop_the_gone();
            self.step();
            self.queue.lock().working = self.images.len();
        }
    }

    /// Waits for work. False at the end.
    fn wait(&self) -> bool {
        let mut state = self.queue.lock();
        while self.images.is_empty() && state.waiting.is_empty() {
            if state.closing {
                return false;
            }
            state = self.queue.0.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        true
    }

    /// Lets images join as long as there is room for the queue's head.
    fn admit(&mut self) {
        loop {
            let mut state = self.queue.lock();
            let Some(head) = state.waiting.front() else { return };
            let fits = self.batch.as_ref().is_some_and(|batch| batch.fits(&head.work) && batch.free() > 0);
            let gone = head.updates.is_closed() || head.wishes.deadline.is_some_and(|at| at <= Instant::now());
            if !fits && !gone && !self.images.is_empty() {
                return;
            }
            let Some(waiting) = state.waiting.pop_front() else { return };
            state.working = self.images.len() + 1;
            self.queue.0.metrics.queue_size(state.waiting.len());
            drop(state);
            if gone {
                self.give_up(&waiting.updates);
                continue;
            }
            if let Err(problem) = self.join(&waiting, fits) {
                let _ = waiting.updates.send(Err(problem));
            }
        }
    }

    fn join(&mut self, waiting: &Waiting, fits: bool) -> Result<(), Problem> {
        let Waiting { work, wishes, since, updates } = waiting;
        if !fits {
            // The memory of the last batch is freed before that of the next is taken.
            self.batch = None;
            self.batch = Some(self.backend.open(work)?);
        }
        let Some(batch) = &mut self.batch else { return Ok(()) };
        let id = batch.join(work)?;
        let began = Instant::now();
        self.queue.0.metrics.waited(began - *since);
        let (wishes, since, updates) = (*wishes, *since, updates.clone());
        self.images.insert(id, InWork { wishes, since, began, shown: 0, updates });
        Ok(())
    }

    /// Takes images out whose clients are gone or whose time is over.
    fn drop_the_gone(&mut self) {
        let over = |image: &InWork| image.wishes.deadline.is_some_and(|deadline| deadline <= Instant::now());
        let gone: Vec<u64> =
            self.images.iter().filter(|(_, i)| i.updates.is_closed() || over(i)).map(|(id, _)| *id).collect();
        for id in gone {
            if let Some(batch) = &mut self.batch {
                batch.cancel(id);
            }
            if let Some(image) = self.images.remove(&id) {
                self.give_up(&image.updates);
            }
        }
    }

    fn give_up(&self, updates: &Sender) {
        let left = updates.is_closed();
        self.queue.0.metrics.cancelled(if left { "client" } else { "deadline" });
        let _ = updates.send(Err(Problem::new(Kind::Cancelled, "the time for this request is over")));
    }

    fn step(&mut self) {
        let Some(batch) = self.batch.as_mut().filter(|_| !self.images.is_empty()) else { return };
        let began = Instant::now();
        let events = match batch.step() {
            Ok(events) => events,
            Err(problem) => {
                for (_, image) in self.images.drain() {
                    let _ = image.updates.send(Err(problem.clone()));
                }
                self.batch = None;
                return;
            }
        };
        self.queue.0.metrics.stepped(self.images.len(), began.elapsed());
        for (id, event) in events {
            let Some(image) = self.images.get_mut(&id) else { continue };
            let update = match event {
                Event::Step { done, total } => {
                    // Previews are spread evenly between the first step and the last.
                    let due = (image.wishes.previews + 1) * done / total.max(1);
                    let preview = match due > image.shown {
                        true => {
                            image.shown = due;
                            batch.preview(id).unwrap_or_default()
                        }
                        false => None,
                    };
                    Ok(Update::Step { done, total, preview })
                }
                Event::Finished(picture) => {
                    let (queued, worked) = (image.began - image.since, image.began.elapsed());
                    self.queue.0.metrics.finished(worked);
                    let mut state = self.queue.lock();
                    state.mean_seconds += 0.1 * (worked.as_secs_f64() - state.mean_seconds);
                    Ok(Update::Finished { picture, queued, worked })
                }
                Event::Failed(problem) => Err(problem),
            };
            let is_last = !matches!(update, Ok(Update::Step { .. }));
            let _ = image.updates.send(update);
            if is_last {
                self.images.remove(&id);
            }
        }
    }
}
