//! A model of the kernel's part in faults, after `userfaultfd(2)` and `mm/userfaultfd.c`, under one
//! lock.

use crate::space::page_table::Wake;
use pagestitch_kernel::{Page, Span};
use shuttle::sync::{Condvar, Mutex, MutexGuard};
use std::mem;

/// The result of touching a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// The bytes of its source.
    Bytes,
    /// Zeros that were installed, as the bytes of a discarded page.
    Discarded,
    /// SIGBUS, or SIGSEGV.
    Signal,
    /// The kernel's zeros for a missing page after its uffd is closed; no thread may ever see them.
    Zeros,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    AlreadyThere,
    Changing,
}

/// The bytes that are installed in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    Bytes,
    Zeros,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Missing,
    Present(Content),
    Marked,
}

/// The events of one read, in the order in which the worker handles them.
#[derive(Debug, Default)]
pub(super) struct Events {
    pub(super) removed: Vec<Page>,
    pub(super) faults: Vec<Page>,
}

#[derive(Debug)]
pub(super) struct Kernel {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    entries: Vec<Entry>,
    /// Pages in which a thread has waited.
    touched: Vec<Page>,
    /// Waiting threads, by a number, and their pages.
    waiting: Vec<(usize, Page)>,
    /// Waiting threads whose fault is unread.
    unread: Vec<(usize, Page)>,
    /// Discards whose event is unread.
    removals: Vec<(usize, Page)>,
    /// Discards in progress: begun, and not continued yet by the discarding thread after its event
    /// was read.
    changing: usize,
    /// False if discards have no event.
    tells: bool,
    next: usize,
    /// Faults that have seen the entry of their page and are not in the list of waiting threads yet. They
    /// hold the lock of the mapping shared.
    looking: usize,
    fenced: bool,
    unregistered: bool,
    closed: bool,
    stopped: bool,
}

impl Kernel {
    pub(super) fn new(pages: usize) -> Self {
        let state = State {
            entries: vec![Entry::Missing; pages],
            touched: Vec::new(),
            waiting: Vec::new(),
            unread: Vec::new(),
            removals: Vec::new(),
            changing: 0,
            tells: true,
            next: 0,
            looking: 0,
            fenced: false,
            unregistered: false,
            closed: false,
            stopped: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Sends no events of discards from now on.
    pub(super) fn do_not_tell(&self) {
        self.lock().tells = false;
    }

    /// Touches a page; waits until the page is present or the thread is woken.
    pub(super) fn touch(&self, page: Page) -> Found {
        let mut state = self.lock();
        loop {
            match state.entries[page.0] {
                _ if state.fenced => return Found::Signal,
                Entry::Present(Content::Bytes) => return Found::Bytes,
                Entry::Present(Content::Zeros) => return Found::Discarded,
                Entry::Marked => return Found::Signal,
                Entry::Missing if state.closed || state.unregistered => return Found::Zeros,
                Entry::Missing => {}
            }
            state.looking += 1;
            drop(state);
            state = self.lock();
            state.looking -= 1;
            self.changed.notify_all();
            // The second look of the kernel takes a marker for a missing page.
            if matches!(state.entries[page.0], Entry::Present(_)) {
                continue;
            }
            let number = state.number();
            state.touched.push(page);
            state.waiting.push((number, page));
            state.unread.push((number, page));
            self.changed.notify_all();
            while state.waiting.iter().any(|(other, _)| *other == number) {
                state = self.changed.wait(state).unwrap();
            }
        }
    }

    /// `madvise(MADV_DONTNEED)`: sends the event, if there is one, and discards the page after the event
    /// is read.
    pub(super) fn remove(&self, page: Page) {
        let mut state = self.lock();
        if !state.tells {
            state.entries[page.0] = Entry::Missing;
            return;
        }
        let number = state.number();
        state.changing += 1;
        state.removals.push((number, page));
        self.changed.notify_all();
        while state.removals.iter().any(|(other, _)| *other == number) {
            state = self.changed.wait(state).unwrap();
        }
        state.changing -= 1;
        drop(state);
        self.lock().entries[page.0] = Entry::Missing;
    }

    /// Waits for events and reads them; none are left if another worker was faster. `None` after
    /// the stop.
    pub(super) fn read(&self) -> Option<Events> {
        self.wait_for_event().then(|| self.read_now())
    }

    /// Epoll: waits until an event is unread. False after the stop.
    pub(super) fn wait_for_event(&self) -> bool {
        let mut state = self.lock();
        while state.unread.is_empty() && state.removals.is_empty() {
            if state.stopped {
                return false;
            }
            state = self.changed.wait(state).unwrap();
        }
        true
    }

    /// Epoll: waits until an event is unread or there is other work, of which [`poke`](Self::poke) tells.
    /// False after the stop.
    pub(super) fn wait_for_work(&self, has_other: impl Fn() -> bool) -> bool {
        let mut state = self.lock();
        while state.unread.is_empty() && !has_other() {
            if state.stopped {
                return false;
            }
            state = self.changed.wait(state).unwrap();
        }
        true
    }

    /// Wakes the threads that wait for work.
    pub(super) fn poke(&self) {
        let _state = self.lock();
        self.changed.notify_all();
    }

    /// Epoll: waits until a thread has waited in a page.
    pub(super) fn wait_for_fault(&self, page: Page) {
        let mut state = self.lock();
        while !state.touched.contains(&page) {
            state = self.changed.wait(state).unwrap();
        }
    }

    /// `read(2)` of a non-blocking descriptor.
    pub(super) fn read_now(&self) -> Events {
        let mut state = self.lock();
        let pages =
            |list: &mut Vec<(usize, Page)>| mem::take(list).into_iter().map(|(_, page)| page).collect();
        let events = Events { removed: pages(&mut state.removals), faults: pages(&mut state.unread) };
        self.changed.notify_all();
        events
    }

    /// UFFDIO_COPY: wakes the waiting threads, except if the page is already there.
    pub(super) fn copy(&self, page: Page, content: Content) -> Answer {
        self.set(page, Entry::Present(content), |entry| matches!(entry, Entry::Present(_)))
    }

    /// The page appears without a fill of ours, like a page of a memfd; no thread is woken.
    pub(super) fn appear(&self, page: Page) {
        let entry = &mut self.lock().entries[page.0];
        if *entry == Entry::Missing {
            *entry = Entry::Present(Content::Bytes);
        }
    }

    /// UFFDIO_POISON.
    pub(super) fn poison(&self, page: Page) -> Answer {
        self.set(page, Entry::Marked, |entry| entry != Entry::Missing)
    }

    fn set(&self, page: Page, to: Entry, is_there: impl Fn(Entry) -> bool) -> Answer {
        let mut state = self.lock();
        if state.changing > 0 {
            return Answer::Changing;
        }
        if is_there(state.entries[page.0]) {
            return Answer::AlreadyThere;
        }
        state.entries[page.0] = to;
        self.wake_in(&mut state, page.span());
        Answer::Done
    }

    pub(super) fn is_resident(&self, page: Page) -> bool {
        matches!(self.lock().entries[page.0], Entry::Present(_))
    }

    pub(super) fn is_missing(&self, page: Page) -> bool {
        self.lock().entries[page.0] == Entry::Missing
    }

    /// The range becomes inaccessible. Waiting threads still wait.
    pub(super) fn fence(&self) {
        self.lock_mapping().fenced = true;
    }

    /// UFFDIO_UNREGISTER: waiting threads continue. The kernel wakes them before it has the lock of the
    /// mapping.
    pub(super) fn unregister(&self) {
        self.wake_all(&mut self.lock());
        self.lock_mapping().unregistered = true;
    }

    /// `close(2)` of the uffd: waiting threads continue, and read zeros as in any memory.
    pub(super) fn close(&self) {
        let mut state = self.lock_mapping();
        state.closed = true;
        self.wake_all(&mut state);
    }

    /// Ends the run: no thread touches pages any more, and the workers return.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    fn wake_all(&self, state: &mut State) {
        let all = Span { first: Page(0), pages: state.entries.len() };
        self.wake_in(state, all);
    }

    fn wake_in(&self, state: &mut State, span: Span) {
        let stays = |(_, page): &(usize, Page)| !span.contains(*page);
        state.waiting.retain(stays);
        state.unread.retain(stays);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The lock of the mapping, exclusively: waits for the faults that hold it.
    fn lock_mapping(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while state.looking > 0 {
            state = self.changed.wait(state).unwrap();
        }
        state
    }
}

impl State {
    fn number(&mut self) -> usize {
        self.next += 1;
        self.next
    }
}

impl Wake for Kernel {
    fn wake(&self, span: Span) {
        self.wake_in(&mut self.lock(), span);
    }
}
