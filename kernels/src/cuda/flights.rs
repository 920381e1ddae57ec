//! [`Flights`]: steps that the device was given and whose tokens the host has not collected; two at most.
//!
//! What a step needs of the host lies in page-locked memory of its own until the step is collected, so that the host may go on to the next one. Its
//! words are copied beside the step that runs, to memory on the device that the step before the running one used; then only a header of 80 bytes
//! has its place between two steps. Parameters of kernels name the header, never the words: a graph does not know which of the two memories it reads.

use std::sync::Arc;

use super::device::{Buffer, Device, HostBuffer, Work, bytes_of_slice, bytes_of_slice_mut};
use super::params::{Header, Pointer, bytes_of};
use super::plan::Plan;
use crate::{Error, Step};

/// Steps that may be on the device at once.
pub(super) const FLIGHTS: usize = 2;

/// What a step is to bring to the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Results {
    /// Tokens that are drawn.
    pub drawn: usize,
    /// Logits of rows without a draw. They stay on the device, until the next step, and are fetched from there.
    pub logits: usize,
}

/// What one of the steps uses.
struct Slot {
    words: Buffer,
    /// The words, then the header.
    from_host: HostBuffer,
    tokens: HostBuffer,
    results: Results,
}

pub(super) struct Flights {
    device: Arc<dyn Device>,
    header: Buffer,
    slots: [Slot; FLIGHTS],
    /// The slot of the next step; the steps in flight have those before it.
    next: usize,
    in_flight: usize,
}

impl Flights {
    pub fn new(device: &Arc<dyn Device>) -> Result<Self, Error> {
        let slot = || -> Result<Slot, Error> {
            Ok(Slot {
                words: Buffer::new(device, 0, "a step")?,
                from_host: HostBuffer::new(device, 0, "a step")?,
                tokens: HostBuffer::new(device, 0, "tokens")?,
                results: Results::default(),
            })
        };
        Ok(Self {
            header: Buffer::zeroed(device, size_of::<Header>(), "a step")?,
            slots: [slot()?, slot()?],
            next: 0,
            in_flight: 0,
            device: Arc::clone(device),
        })
    }

    /// Where kernels find the step they belong to.
    pub fn header(&self) -> Pointer {
        self.header.at()
    }

    /// Whether `step` may be given to the device now; and its slot, whose last step was collected.
    pub fn begin(&self, step: &Step) -> Result<usize, Error> {
        let fault = |text: &str| Err(Error::Device(text.to_owned()));
        if self.in_flight == FLIGHTS {
            return fault("a step before the one before the last was collected");
        }
        if self.in_flight > 0 && !step.deferred {
            return fault("a step that is waited for, while others are to be collected");
        }
        if self.in_flight > 0 && self.before().logits > 0 {
            return fault("a step behind one whose logits are to be collected");
        }
        Ok(self.next)
    }

    /// What the last step that was launched brings.
    pub fn before(&self) -> Results {
        self.slots[(self.next + FLIGHTS - 1) % FLIGHTS].results
    }

    /// Launches a step, which draws its tokens to `tokens`, behind those in flight. Nobody waits here.
    pub fn launch(
        &mut self,
        plan: &mut Plan,
        list: &[Work],
        tokens: Pointer,
        results: Results,
    ) -> Result<(), Error> {
        let device = &self.device;
        let slot = &mut self.slots[self.next];
        let words = bytes_of_slice(&plan.words);
        if slot.words.bytes() < words.len() {
            slot.words = Buffer::new(device, words.len().next_power_of_two(), "a step")?;
        }
        let all = words.len() + size_of::<Header>();
        if slot.from_host.bytes() < all {
            slot.from_host = HostBuffer::new(device, all.next_power_of_two(), "a step")?;
        }
        let drawn = results.drawn * size_of::<u32>();
        if slot.tokens.bytes() < drawn {
            slot.tokens = HostBuffer::new(device, drawn.next_power_of_two(), "tokens")?;
        }
        plan.header.base = slot.words.at();
        slot.from_host.write(0, words);
        slot.from_host.write(words.len(), bytes_of(&plan.header));
        let from = slot.from_host.at();
        device.upload_beside(slot.words.at(), from, words.len())?;
        let header = from + words.len() as u64;
        device.upload_later(self.header.at(), header, size_of::<Header>())?;
        device.run(list, plan.again)?;
        device.download_later(tokens, slot.tokens.at(), drawn)?;
        device.mark(self.next)?;
        slot.results = results;
        self.next = (self.next + 1) % FLIGHTS;
        self.in_flight += 1;
        Ok(())
    }

    /// Waits for the oldest step in flight and takes its tokens.
    pub fn collect(&mut self, tokens: &mut Vec<u32>) -> Result<Results, Error> {
        if self.in_flight == 0 {
            return Err(Error::Device("no step is to be collected".to_owned()));
        }
        let oldest = (self.next + FLIGHTS - self.in_flight) % FLIGHTS;
        self.in_flight -= 1;
        let slot = &self.slots[oldest];
        self.device.wait(oldest)?;
        tokens.resize(slot.results.drawn, 0);
        slot.tokens.read(bytes_of_slice_mut(tokens));
        Ok(slot.results)
    }
}
