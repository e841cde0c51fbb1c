//! A number on which threads wait without a lock, so a signal handler may change it and wake them.
//! See `futex(2)`.

#[cfg(not(any(miri, shuttle)))]
pub(super) use kernel::Futex;
#[cfg(any(miri, shuttle))]
pub(super) use locked::Futex;

#[cfg(not(any(miri, shuttle)))]
mod kernel {
    use nix::errno::Errno;
    use nix::libc;
    use std::ptr;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Debug, Default)]
    pub(in crate::sync) struct Futex(AtomicU32);

    impl Futex {
        pub(in crate::sync) fn now(&self) -> u32 {
            self.0.load(Ordering::SeqCst)
        }

        /// Waits until the number changes, if it is still `seen`. May also return without a change.
        pub(in crate::sync) fn wait(&self, seen: u32) {
            self.call(libc::FUTEX_WAIT, seen);
        }

        /// Changes the number and wakes all waiting threads.
        pub(in crate::sync) fn change(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
            self.call(libc::FUTEX_WAKE, i32::MAX as u32);
        }

        fn call(&self, operation: i32, value: u32) {
            // A thread that a signal handler interrupts must find its errno unchanged.
            let errno = Errno::last_raw();
            let (word, operation) = (self.0.as_ptr(), operation | libc::FUTEX_PRIVATE_FLAG);
            // SAFETY: the kernel reads the word, which lives as long as `self`; without a timeout
            // it reads no other memory.
            #[expect(unsafe_code, reason = "a system call without a wrapper")]
            let _ = unsafe {
                libc::syscall(libc::SYS_futex, word, operation, value, ptr::null::<libc::timespec>())
            };
            Errno::set_raw(errno);
        }
    }
}

/// For model checkers, which cannot run system calls.
#[cfg(any(miri, shuttle))]
mod locked {
    use crate::sync::{Condvar, Mutex};

    #[derive(Debug, Default)]
    pub(in crate::sync) struct Futex {
        word: Mutex<u32>,
        changed: Condvar,
    }

    impl Futex {
        pub(in crate::sync) fn now(&self) -> u32 {
            *self.word.lock().unwrap()
        }

        pub(in crate::sync) fn wait(&self, seen: u32) {
            let mut word = self.word.lock().unwrap();
            while *word == seen {
                word = self.changed.wait(word).unwrap();
            }
        }

        pub(in crate::sync) fn change(&self) {
            *self.word.lock().unwrap() += 1;
            self.changed.notify_all();
        }
    }
}
