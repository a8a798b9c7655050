//! Counters in the text format of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::time::Duration;

/// Upper bounds of the histograms' buckets, seconds: from 5 ms on, each 1.5 times the one before, up to ten minutes.
const BUCKETS: usize = 30;

fn bound(bucket: usize) -> f64 {
    0.005 * 1.5f64.powi(bucket as i32)
}

#[derive(Clone, Default)]
struct Histogram {
    /// Counts of each bucket alone.
    counts: [u64; BUCKETS],
    count: u64,
    sum: f64,
}

impl Histogram {
    fn add(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        if let Some(bucket) = (0..BUCKETS).find(|&bucket| seconds <= bound(bucket)) {
            self.counts[bucket] += 1;
        }
        self.count += 1;
        self.sum += seconds;
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut below = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            below += count;
            let _ = writeln!(out, "{name}_bucket{{le=\"{:.4}\"}} {below}", bound(bucket));
        }
        let (count, sum) = (self.count, self.sum);
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {count}\n{name}_sum {sum}\n{name}_count {count}");
    }
}

#[derive(Default)]
struct Counts {
    requests: BTreeMap<(String, u16), u64>,
    cancelled: BTreeMap<&'static str, u64>,
    images: u64,
    queue: usize,
    batch: usize,
    steps: u64,
    waiting: Histogram,
    working: Histogram,
    step: Histogram,
}

/// The counters of a server.
#[derive(Default)]
pub struct Metrics(Mutex<Counts>);

impl Metrics {
    fn with(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    }

    /// A request was answered.
    pub fn answered(&self, route: &str, status: u16) {
        self.with(|counts| *counts.requests.entry((route.to_string(), status)).or_default() += 1);
    }

    /// So many images wait.
    pub fn queue_size(&self, images: usize) {
        self.with(|counts| counts.queue = images);
    }

    /// An image has waited.
    pub fn waited(&self, time: Duration) {
        self.with(|counts| counts.waiting.add(time));
    }

    /// A batch of so many images has taken a step.
    pub fn stepped(&self, images: usize, time: Duration) {
        self.with(|counts| {
            counts.batch = images;
            counts.steps += 1;
            counts.step.add(time);
        });
    }

    /// An image is done after so long in the batch.
    pub fn finished(&self, time: Duration) {
        self.with(|counts| {
            counts.images += 1;
            counts.working.add(time);
        });
    }

    /// An image was given up.
    pub fn cancelled(&self, by: &'static str) {
        self.with(|counts| *counts.cancelled.entry(by).or_default() += 1);
    }

    /// Mean seconds of a step; `None` before the first.
    pub fn step_seconds(&self) -> Option<f64> {
        let counts = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        (counts.step.count > 0).then(|| counts.step.sum / counts.step.count as f64)
    }

    /// The text that Prometheus reads.
    pub fn text(&self) -> String {
        let mut out = String::new();
        self.with(|counts| {
            let _ = writeln!(
                out,
                "# HELP respodiff_requests_total Requests answered.\n# TYPE respodiff_requests_total counter"
            );
            for ((route, code), count) in &counts.requests {
                let _ = writeln!(out, "respodiff_requests_total{{route=\"{route}\",code=\"{code}\"}} {count}");
            }
            let _ = writeln!(
                out,
                "# HELP respodiff_cancelled_total Images given up.\n# TYPE respodiff_cancelled_total counter"
            );
            for (by, count) in &counts.cancelled {
                let _ = writeln!(out, "respodiff_cancelled_total{{by=\"{by}\"}} {count}");
            }
            for (name, kind, help, value) in [
                ("images_total", "counter", "Images finished.", counts.images),
                ("steps_total", "counter", "Steps of the batch.", counts.steps),
                ("queue_size", "gauge", "Images that wait.", counts.queue as u64),
                ("batch_size", "gauge", "Images in the latest step.", counts.batch as u64),
            ] {
                let _ = writeln!(
                    out,
                    "# HELP respodiff_{name} {help}\n# TYPE respodiff_{name} {kind}\nrespodiff_{name} {value}"
                );
            }
            counts.waiting.write(&mut out, "respodiff_queue_seconds", "Time of an image in the queue.");
            counts.working.write(&mut out, "respodiff_generation_seconds", "Time of an image in the batch.");
            counts.step.write(&mut out, "respodiff_step_seconds", "Time of a step of the batch.");
        });
        out
    }
}
